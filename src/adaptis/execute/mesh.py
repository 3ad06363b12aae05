"""A pipeline beside the other dimensions of a `DeviceMesh`: "dp", "fsdp" and "tp".

Each rank works along its own row of "pp", with the plan of that row. ::

    dp, fsdp    replicas of the whole pipeline; each has micro-batches of its own
    fsdp        parameters, gradients and optimizer state lie in parts on the replicas
    tp          layers are cut by the user's function, into DTensors

Losses are divided by the tokens of all replicas, so gradients are summed over them, never averaged:
loss and gradients are those of one process that trains on the micro-batches of replica 0, then
those of replica 1, and so on, whatever tokens each has.

Gradients are summed once a step, as soon as the last backward of the last stage that has them is
through (the program's REDUCE_GRAD), while the rest of the step goes on. No hook on a parameter is
needed for it, so a W that adds to its parameter by itself counts as any other.

`fully_shard` is given modules of our own, a layer each, that look at the layer's parameters and
compute nothing: `units.Sharded`. The layers themselves have no hooks. Within a step they find their
parameters whole, gathered once, or around each run of computations where the plan shards the stage;
one empty forward and backward then is all that torch sees, and reduces and reshards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adaptis.errors import PlanError
from adaptis.execute.units import Sharded, Unit, Whole, layout_of
from adaptis.program import Copy, Shard, Sharding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from adaptis.execute.world import World
    from adaptis.measure.stage import StageModule
    from adaptis.program import Instruction, Layout, Program

    Parallelize = Callable[[nn.Module, DeviceMesh], object]

PP, DP, FSDP, TP = DIMENSIONS = ("pp", "dp", "fsdp", "tp")


class Mesh:
    """This rank's place, and what its stages share with the other rows."""

    def __init__(
        self, world: World, mesh: DeviceMesh | None, parallelize: Parallelize | None = None
    ) -> None:
        """Take the dimensions apart; every rank of the mesh does this.

        Args:
            world: all ranks.
            mesh: None: one row of all ranks.
            parallelize: cuts one layer over the "tp" dimension, which it is given.

        Raises:
            PlanError: a dimension has no meaning here, or there is none named "pp".
        """
        names = (PP,) if mesh is None else mesh.mesh_dim_names or ()
        if PP not in names or not set(names) <= set(DIMENSIONS):
            raise PlanError(
                f"the mesh has the dimensions {', '.join(map(str, names)) or 'without names'}; "
                f"name one 'pp' and the others among 'dp', 'fsdp', 'tp'"
            )
        if (parallelize is not None) != (TP in names):
            raise PlanError(
                "a dimension 'tp' of the mesh and 'parallelize', which cuts the layers along it, "
                "need each other; give both or neither"
            )
        self._mesh, self._parallelize = mesh, parallelize
        self._names = names
        self.row = self._along(world, PP) if mesh is not None else world
        self.data = self._along(world, *(n for n in (DP, FSDP) if n in names))
        self.tensor = self._along(world, *(n for n in (TP,) if n in names))
        self._units: list[Unit] = []
        self._of: dict[int, list[Unit]] = defaultdict(list)  # stage -> its units
        self._runs: Counter[int] = Counter()  # how often a step gathers each stage
        self._left: Counter[int] = Counter()

    def _along(self, world: World, *names: str) -> World:
        return world.along(self._part(*names) if names else None)

    def _part(self, *names: str) -> DeviceMesh:
        mesh: Any = self._mesh
        return mesh[names if len(names) > 1 else names[0]]

    @property
    def _in_parts(self) -> bool:
        return FSDP in self._names or TP in self._names

    @property
    def is_first_row(self) -> bool:
        """Whether this rank is in the row that speaks for all."""
        return not self.data.rank and not self.tensor.rank

    def sum(self, number: float) -> float:
        """The sum of all ranks' numbers, on all of them."""
        return self.tensor.sum(self.data.sum(self.row.sum(number)))

    def divide(self, modules: Mapping[int, StageModule]) -> None:
        """Cut what the stages (by number) hold: over "tp", then over "fsdp".

        Raises:
            PlanError: the layers are wrapped already, or tied ones are cut in two ways.
        """
        _refuse_wrapped(modules.values())
        if self._parallelize is not None:
            tied = [places for places in _places(modules).values() if len(places) > 1]
            for module in modules.values():
                for layer in module.layer_modules():
                    self._parallelize(layer, self._part(TP))
                module.register_forward_hook(_refuse_divided)
            for places in tied:
                _tie(places)
        if FSDP in self._names:
            mesh = self._part(*(n for n in (DP, FSDP) if n in self._names))
            self._units = [Sharded(self.data, mesh, *group) for group in _layers(modules)]

    def share(
        self,
        program: Program,
        modules: Mapping[int, StageModule],
        head: Iterable[nn.Parameter],
    ) -> None:
        """Take the parameters that are to be summed over the replicas, now that they are cut.

        Args:
            program: of the row.
            modules: stages of this rank, by number.
            head: this rank's rows of a sharded head.

        Raises:
            PlanError: the program has what cannot be done with parameters in parts.
        """
        row = program.devices[self.row.rank]
        self._refuse(program, row)
        gathers = (i for i in row if isinstance(i, Shard) and i.what is Sharding.GATHER)
        self._runs.update(instruction.stage for instruction in gathers)
        if self.data.size > 1:
            self._units += self._wholes(program.layout, modules, head)
        for unit in self._units:
            for stage in unit.stages:
                self._of[stage].append(unit)

    def _refuse(self, program: Program, row: Sequence[Instruction]) -> None:
        layout = program.layout
        for found, what in (
            (layout.sharded and FSDP not in self._names, "stages that are sharded over replicas"),
            (layout.replicas != self.data.size, f"{layout.replicas} replicas"),
        ):
            if found:
                raise PlanError(
                    f"the plan has {what}, the mesh {self.data.size} along 'dp' and 'fsdp'; give "
                    f"a mesh that suits the plan"
                )
        for found, what in (
            (layout.reductions, "a head that is sharded over the pipeline"),
            (any(isinstance(i, Copy) for i in row), "activations that go to the host's memory"),
        ):
            if found and self._in_parts:
                raise PlanError(
                    f"the plan has {what}, which does not go together with parameters in parts; "
                    f"plan without it, or use a mesh of 'pp' and 'dp' alone"
                )

    def _wholes(
        self, layout: Layout, modules: Mapping[int, StageModule], head: Iterable[nn.Parameter]
    ) -> Iterator[Whole]:
        """What is not cut over the replicas; what the same stages have is together."""
        cut = {id(p) for unit in self._units for p in unit.parameters()}
        last = {layout.num_stages} if layout.reductions else set()
        stages: dict[int, set[int]] = defaultdict(lambda: set(last))  # rows may lie in any weight
        found = {id(p): p for p in head}
        for s, module in modules.items():
            for parameter in module.parameters():
                found[id(parameter)] = parameter
                stages[id(parameter)].add(s)
        alike: dict[frozenset[int], list[nn.Parameter]] = defaultdict(list)
        for key, parameter in found.items():
            if key not in cut and parameter.requires_grad:
                alike[frozenset(stages[key])].append(parameter)
        return (Whole(self.data, key, group) for key, group in alike.items())

    def begin(self) -> None:
        """A step begins: start gathering what stays whole all the way."""
        self._left = self._runs.copy()
        for unit in self._units:
            unit.left = set(unit.stages)
            if not unit.stages <= self._runs.keys():
                unit.gather()

    def gather(self, stage: int) -> None:
        """UNSHARD: start gathering a stage's parameters."""
        for unit in self._of[stage]:
            unit.gather()

    def wait(self, stage: int) -> None:
        """Until a stage's parameters are whole."""
        for unit in self._of[stage]:
            if unit.coming is not None:
                self._stand(unit.wait)

    def free(self, stage: int) -> None:
        """RESHARD: let a stage's parameters go; after its last computation the sum does that."""
        self._left[stage] -= 1
        if self._left[stage]:
            for unit in self._of[stage]:
                if len(unit.stages) == 1:
                    unit.free()

    def reduce(self, stage: int) -> None:
        """REDUCE_GRAD: start summing the gradients that no further backward adds to."""
        for unit in self._of[stage]:
            unit.left.discard(stage)
            if not unit.left:
                self._stand(unit.reduce)

    def finish(self) -> None:
        """Until all gradients are summed."""
        for unit in self._units:
            if unit.left:  # a program of one replica has no REDUCE_GRAD
                self._stand(unit.reduce)
        for unit in self._units:
            self._stand(unit.finish)

    def _stand(self, until: Callable[[], None]) -> None:
        """This rank may stand still, as it needs other rows."""
        self.row.progress.waits()
        until()
        self.row.progress.resumes()

    def whole(self, on: bool) -> None:
        """Gather all parameters, or let them go."""
        for unit in self._units:
            if on:
                unit.gather()
                unit.wait()
            else:
                unit.free()

    def counts(self, parameter: Tensor) -> bool:
        """Whether this rank's part counts in a sum over all: what several rows hold counts once."""
        mesh: Any = self._mesh
        if mesh is None:
            return True
        divided = set()
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names or ()
            pairs = zip(names, parameter.placements, strict=True)
            divided = {name for name, placement in pairs if not placement.is_replicate()}
        alike = set(self._names) - {PP} - divided
        return not any(mesh.get_local_rank(name) for name in alike)


def groups(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """For an optimizer: one group for each mesh that parameters lie on, as fused kernels need."""
    found: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found[mesh].append(parameter)
    if len(found) > 1:
        return [{"params": group} for group in found.values()]
    return [parameter for group in found.values() for parameter in group]


def _layers(modules: Mapping[int, StageModule]) -> list[tuple[set[int], list[nn.Module]]]:
    """Layer by layer its stages and the modules that own its parameters.

    Layers that have a parameter or an owner in common are one.
    """
    places = _places(modules)
    found: list[tuple[set[int], dict[nn.Module, None]]] = []
    for s, module in modules.items():
        for parameters in module.layer_parameters().values():
            stages, owners = {s}, {o: None for p in parameters for o, _ in places[id(p)]}
            for other in [f for f in found if f[1].keys() & owners.keys()]:
                found.remove(other)
                stages |= other[0]
                owners = other[1] | owners
            if any(p.dim() for p in parameters):
                found.append((stages, owners))
    return [(stages, list(owners)) for stages, owners in found]


def _places(modules: Mapping[int, StageModule]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Each parameter's places, by its id: the modules that own it, and its names there."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in modules.values():
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    found[id(parameter)].append((owner, name))
    return found


def _tie(places: list[tuple[nn.Module, str]]) -> None:
    """What was one parameter before it was cut is one again."""
    first = places[0][0].get_parameter(places[0][1])
    for owner, name in places[1:]:
        refuse_unlike(name, [layout_of(first), layout_of(owner.get_parameter(name))])
        owner._parameters[name] = first


def refuse_unlike(name: str, layouts: Iterable[str]) -> None:
    """What is tied must be cut alike everywhere.

    Raises:
        PlanError: it is not.
    """
    found = sorted(set(layouts))
    if len(found) > 1:
        raise PlanError(
            f"the tied parameter {name} is cut as {' and as '.join(f or 'whole' for f in found)}; "
            f"let 'parallelize' cut all layers that share it alike"
        )


def _refuse_divided(module: nn.Module, _: Any, output: Any) -> None:
    output = output.values() if isinstance(output, dict) else output
    given = [output] if isinstance(output, Tensor) else output
    if any(isinstance(value, DTensor) for value in given):
        raise PlanError(
            f"the stage of layers [{module.start}, {module.stop}) hands on a DTensor; let "
            f"'parallelize' give its last layer local outputs (use_local_output=True)"
        )


def _refuse_wrapped(modules: Iterable[StageModule]) -> None:
    for module in modules:
        kinds = [
            type(m).__name__
            for m in module.modules()
            if isinstance(m, DistributedDataParallel | FSDPModule)
        ]
        kinds += ["DTensor" for p in module.parameters() if isinstance(p, DTensor)]
        if kinds:
            raise PlanError(
                f"layers [{module.start}, {module.stop}) have a {kinds[0]} in them, whose "
                f"reductions know nothing of micro-batches; give plain layers, and a mesh with "
                f"'dp', 'fsdp' or 'tp'"
            )
