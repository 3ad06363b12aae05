"""Plans and schedules in the formats of other systems: written for them, read from them.

A reader is strict: what another system would read in silence as something else is refused, with
its place in the file. Whatever is read is proven by `adaptis.check` before it becomes a plan.
"""
