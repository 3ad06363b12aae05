"""The slow opinion that `check` is held against, and the mistakes that both judge.

The explorer states the rules again, in sets and counters, and walks through all interleavings.
"""

from collections import Counter, defaultdict
from dataclasses import replace

from adaptis.check import Semantics
from adaptis.program import (
    Compute,
    Copy,
    Join,
    Kind,
    Op,
    Overlap,
    Receive,
    Send,
    Shard,
    Sharding,
    Step,
    Together,
    Way,
    parts,
)

GROUPS = ((Together.SHARE, Together.TAKE), (Together.SUM_S,), (Together.SUM_T,))


class Explorer:
    """Walks through all reachable states of a program: how far each device has come.

    The k-th send on a link meets its k-th receive, so positions say everything.
    """

    def __init__(self, program, semantics):
        self.program, self.semantics, self.layout = program, semantics, program.layout
        self.sends, self.receives = defaultdict(list), defaultdict(list)
        self.joins = defaultdict(list)
        for device, index, instruction in self.all():
            if isinstance(instruction, Send):
                self.sends[device, instruction.target].append(index)
            elif isinstance(instruction, Receive):
                self.receives[instruction.source, device].append(index)
            elif isinstance(instruction, Join):
                self.joins[group(instruction)].append((device, index))
        self.partner = {}
        for link in self.sends.keys() & self.receives.keys():
            for s, r in zip(self.sends[link], self.receives[link], strict=False):
                self.partner[link[0], s] = (link[1], r)
                self.partner[link[1], r] = (link[0], s)

    def all(self):
        for device, row in enumerate(self.program.devices):
            yield from ((device, index, instruction) for index, instruction in enumerate(row))

    def works(self):
        """Whether the right things are done and every interleaving comes to its end."""
        opinions = (self.complete, self.placed, self.matched, self.together, self.readable)
        return all(opinion() for opinion in opinions) and self.reduced() and not self.stuck()

    def complete(self):
        """Each computation once, on its device, R where the stage is recomputed, STEP last."""
        found, layout = Counter(), self.layout
        for device, row in enumerate(self.program.devices):
            if any(isinstance(i, Step) for i in row[:-1]):
                return False
            for c in (c for i in row for c in parts(i)):
                home = device if c.stage == layout.num_stages else -1
                if 0 <= c.stage < layout.num_stages and layout.placement[c.stage] != device:
                    return False
                found[home, c.stage, c.microbatch, c.op.value] += 1
        expected = set()
        for m in range(layout.num_microbatches):
            for s in layout.stages_of(m):
                halves = (-1, s, m, "B") not in found
                again = "R" if s in layout.recomputed else ""
                expected |= {(-1, s, m, op) for op in ("FIW" if halves else "FB") + again}
            if layout.reductions:
                for d in range(len(self.program.devices)):
                    expected |= {(d, layout.num_stages, m, op) for op in "ST"}
        return found == Counter(expected)

    def placed(self):
        """Transfers, joins, copies and shards name what can be meant."""
        layout = self.layout
        for device, _, i in self.all():
            if isinstance(i, Send | Receive) and i.value.kind not in (
                Kind.OUTPUT,
                Kind.INPUT_GRAD,
            ):
                return False
            if isinstance(i, Join) and not (layout.reductions and i.stage == layout.num_stages):
                return False
            if isinstance(i, Shard):
                of_head = layout.reductions and i.stage == layout.num_stages
                if not of_head and layout.placement[i.stage : i.stage + 1] != (device,):
                    return False
                if i.what is not Sharding.REDUCE and i.stage not in layout.sharded:
                    return False
            if isinstance(i, Copy) and i.microbatch >= layout.num_microbatches:
                return False
        return True

    def matched(self):
        """The two ends of every transfer mean the same value, and neither is alone."""
        ends = sum(map(len, self.sends.values())) + sum(map(len, self.receives.values()))
        value = lambda at: self.program.devices[at[0]][at[1]].value  # noqa: E731
        return len(self.partner) == ends and all(
            value(a) == value(b) for a, b in self.partner.items()
        )

    def together(self):
        """The same joins on all devices, in the same order; the last stage's output is shared."""
        reductions, rows = self.layout.reductions, self.program.devices
        counts = (min(reductions, 1), min(reductions, 1), reductions // 2)
        for names, count in zip(GROUPS, counts, strict=True):
            orders = [
                [i.microbatch for i in row if isinstance(i, Join) and i.what in names]
                for row in rows
            ]
            full = list(range(self.layout.num_microbatches)) * count
            if any(order != orders[0] or sorted(order) != full for order in orders):
                return False
        for device, _, i in self.all():
            if isinstance(i, Join) and i.what in GROUPS[0]:
                mine = device == self.layout.placement[-1]
                if mine != (i.what is Together.SHARE):
                    return False
        return len({row[-1:] == (Step(clipped=True),) for row in rows}) == 1

    def reduced(self):
        """One sum of the gradients of each stage where there is something to add, at the end."""
        layout, found = self.layout, Counter()
        adding = (Op.BACKWARD, Op.BACKWARD_WEIGHT, Op.SCORES_GRADIENT)
        for device, at, i in self.all():
            if isinstance(i, Shard) and i.what is Sharding.REDUCE:
                found[device, i.stage] += 1
                later = [c for other in self.program.devices[device][at:] for c in parts(other)]
                if any(c.stage == i.stage and c.op in adding for c in later):
                    return False
        expected = Counter()
        if layout.copies > 1 or layout.replicas > 1:
            expected.update((device, s) for s, device in enumerate(layout.placement))
            if layout.reductions:
                expected.update((d, layout.num_stages) for d in range(len(self.program.devices)))
        return found == expected

    def readable(self):
        """Before an instruction its device got what it reads, and never what it leaves.

        What was gathered is forgotten at the end.
        """
        for row in self.program.devices:
            there = set()
            for instruction in row:
                if not there.issuperset(self.layout.reads(instruction)):
                    return False
                if not there.isdisjoint(self.layout.writes(instruction)):
                    return False
                there.update(self.layout.writes(instruction))
                there.difference_update(self.layout.takes(instruction))
            if any(value.kind is Kind.PARAMETERS for value in there):
                return False
        return True

    def stuck(self):
        """The states from which nothing goes on although something is left."""
        needs = {(d, i): self.needs(d, i) for d, i, _ in self.all()}
        first = (0,) * len(self.program.devices)
        last = tuple(map(len, self.program.devices))
        seen, todo, dead = {first}, [first], []
        while todo:
            state = todo.pop()
            following = list(self.next(state, last, needs))
            if not following and state != last:
                dead.append(state)
            for other in following:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return dead

    def next(self, state, last, needs):
        for device, index in enumerate(state):
            if index == last[device] or not free(state, needs[device, index]):
                continue
            moved = list(state)
            moved[device] += 1
            if self.semantics is Semantics.RENDEZVOUS and (device, index) in self.partner:
                other, at = self.partner[device, index]
                if other == device or state[other] != at or not free(state, needs[other, at]):
                    continue
                moved[other] += 1
            yield tuple(moved)

    def needs(self, device, index):
        """Which instructions of other devices must have ended."""
        row = self.program.devices[device]
        posted = self.semantics is Semantics.POSTED
        if isinstance(row[index], Step):
            mine = [i for i in range(index) if isinstance(row[i], Send)]
            return [self.partner[device, i] for i in mine] if posted else []
        if isinstance(row[index], Receive) and self.semantics is Semantics.BUFFERED:
            return [self.partner[device, index]]
        result = []
        for value in self.layout.reads(row[index]):
            for i in range(index):
                if isinstance(row[i], Join) and value in self.layout.writes(row[i]):
                    who = self.joins[group(row[i])]
                    if row[i].what is Together.TAKE:  # handed out by one, who waits for nobody
                        who = [
                            (d, i)
                            for d, i in who
                            if self.program.devices[d][i].what is Together.SHARE
                        ]
                    result += who
                if posted and isinstance(row[i], Receive) and row[i].value == value:
                    result.append(self.partner[device, i])
        return result


def free(state, needs):
    return all(state[device] > index for device, index in needs)


def group(join):
    number = next(n for n, names in enumerate(GROUPS) if join.what in names)
    return number, join.microbatch


def spoil(program, rng):
    """One random mistake; now and then it is none."""
    rows = [list(row) for row in program.devices]
    full = [d for d, row in enumerate(rows) if len(row) > 1]
    device = rng.choice(full)
    row = rows[device]
    index = rng.randrange(len(row))
    mistakes = (
        swap,
        swap_with_next,
        drop,
        duplicate,
        move,
        retarget,
        another,
        fuse,
        repeat_transfer,
    )
    rng.choice(mistakes)(rows, device, index, rng)
    return replace(program, devices=tuple(map(tuple, rows)))


def swap(rows, device, index, rng):
    row, other = rows[device], rng.randrange(len(rows[device]))
    row[index], row[other] = row[other], row[index]


def swap_with_next(rows, device, index, rng):
    row = rows[device]
    index = min(index, len(row) - 2)
    row[index], row[index + 1] = row[index + 1], row[index]


def drop(rows, device, index, rng):
    del rows[device][index]


def duplicate(rows, device, index, rng):
    rows[device].insert(rng.randrange(len(rows[device])), rows[device][index])


def move(rows, device, index, rng):
    instruction = rows[device].pop(index)
    row = rows[rng.choice((device, rng.randrange(len(rows))))]
    row.insert(rng.randrange(len(row) + 1), instruction)


def retarget(rows, device, index, rng):
    places = [i for i, x in enumerate(rows[device]) if isinstance(x, Send | Receive)]
    if places:
        i = rng.choice(places)
        name = "target" if isinstance(rows[device][i], Send) else "source"
        rows[device][i] = replace(rows[device][i], **{name: rng.randrange(len(rows) + 1)})


def another(rows, device, index, rng):
    """Another operation, stage, micro-batch or kind in place of the right one."""
    found = rows[device][index]
    names = {Compute: ("op", Op), Join: ("what", Together), Copy: ("way", Way)}
    numbers = ({"stage": rng.randrange(4)}, {"microbatch": rng.randrange(3)})
    if isinstance(found, Send | Receive):
        change = rng.choice(({"kind": rng.choice(list(Kind))}, *numbers))
        rows[device][index] = replace(found, value=replace(found.value, **change))
    elif isinstance(found, Shard):
        change = rng.choice(({"what": rng.choice(list(Sharding))}, numbers[0]))
        rows[device][index] = replace(found, **change)
    elif isinstance(found, Overlap):
        rows[device][index] = Overlap(found.second, found.first)
    elif isinstance(found, Step):
        rows[device][index] = Step(not found.clipped)
    else:
        name, words = names[type(found)]
        rows[device][index] = replace(
            found, **rng.choice(({name: rng.choice(list(words))}, *numbers))
        )


def fuse(rows, device, index, rng):
    """Two computations become one, or one becomes two again."""
    row = rows[device]
    if isinstance(row[index], Overlap):
        row[index : index + 1] = rng.sample(parts(row[index]), 2)
        return
    places = [i for i, x in enumerate(row) if isinstance(x, Compute)]
    if len(places) > 1:
        k = rng.randrange(len(places) - 1)
        second = row.pop(places[k + 1])
        row[places[k]] = Overlap(row[places[k]], second)


def repeat_transfer(rows, device, index, rng):
    """Both ends of one transfer twice."""
    sends = [i for i, x in enumerate(rows[device]) if isinstance(x, Send)]
    if not sends:
        return
    i = rng.choice(sends)
    send = rows[device][i]
    there = rows[send.target] if send.target < len(rows) else []
    ends = [j for j, x in enumerate(there) if isinstance(x, Receive) and x.value == send.value]
    if ends:
        rows[device].insert(i, send)
        there.insert(ends[0], there[ends[0]])
