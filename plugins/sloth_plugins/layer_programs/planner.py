"""Which plan a pass of some shape follows, made when the first such pass arrives, and how long the pass will take."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from sloth_backend import plan as plans
from sloth_backend import ranks
from sloth_backend.budget import device_budget, host_budget
from sloth_backend.plan import Cached, Costs, Level, MemoryPlan
from sloth_backend.run import Run
from sloth_kernels.linears import DENSE_TRAFFIC
from sloth_kernels.program import INPUT
from sloth_plugins.layer_programs import head, sharded
from sloth_plugins.layer_programs.costs import BYTES, Estimate, Shape, levels_of
from sloth_plugins.layer_programs.head import LossTile
from sloth_plugins.layer_programs.layer import Layer, documents_shape
from sloth_plugins.layer_programs.probe import evaluating

log = logging.getLogger("sloth_backend")

PASS_SECONDS, LAYER_SECONDS = 6e-3, 2e-3
"""What a pass costs the host by itself, and each of its layers, forward and backward: no pass is faster than that."""
LAUNCH_SECONDS = 3.5e-3
"""What a layer costs the host that launches all of its kernels one by one, forward and backward."""


def shared_budget(run: Run) -> int | None:
    """The budget of all ranks, which all of them must ask for at one point; None where there is nothing to share.

    Ranks whose layers gather weights from each other must recompute the same layers, or they wait for each other for
    ever.
    """
    return ranks.least(device_budget(run.device, run.config)) if ranks.several() else None


class Chosen(NamedTuple):
    """A plan, what it was chosen from, and how the loss runs under it."""

    plan: MemoryPlan
    costs: Costs
    loss_tile: LossTile
    loss_seconds: float

    def seconds(self) -> float:
        """Beyond the fastest there is: of layers, of the loss, and of weights that are not cached."""
        cached = self.costs.cached
        made_dense = sum(cached.seconds_per_layer[self.plan.cached_layers :]) if cached is not None else 0.0
        return sum(level.seconds for level in self.plan.levels) + self.loss_seconds + made_dense


class Planner:
    """Plans the passes of one model.

    Args:
        model: the causal language model.
        run: its options and device.
        layers: its programs, in the order in which they run.
        offloads: whether values may wait in host memory.
        given: a plan to follow for passes of every shape, its values named; None to plan for each shape.
        shared_budget: bytes that every rank plans with; None to ask the device at each plan.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        layers: Sequence[Layer],
        offloads: bool,
        given: MemoryPlan | None = None,
        shared_budget: int | None = None,
    ) -> None:
        self.model = weakref.ref(model)
        self.run, self.layers, self.offloads = run, list(layers), offloads
        self.given, self.shared_budget = given, shared_budget
        self.device = run.device or self.layers[0].x.device
        self.traced: dict[torch.dtype | None, list[Layer]] = {None: self.layers}
        """Autocast's dtype -> the layers as they are under it; those that are alike share one."""
        self.plans: dict[Shape, Chosen] = {}
        self.seconds: dict[Shape, float] = {}
        self.fixed_bytes: int | None = None
        self.waiting_bytes = 0
        """By how much gradients that wait for the last pass of a step are larger than those of a pass alone."""
        self.limit: int | None = None
        self.transient = False
        """Whether nobody keeps a tensor of a pass when the next one begins: whoever runs the passes says so."""

    def forget(self) -> None:
        """Let the programs keep no parameter until the next pass."""
        for layer in self.layers:
            layer.made.forget()

    def planned(self, shape: Shape, device: torch.device) -> MemoryPlan:
        """The plan for passes of ``shape``."""
        if shape not in self.plans:
            self._trace(shape.autocast, device)
            self.plans[shape] = self._all_kept(shape, device) or self._weighed(shape, device)
        return self.plans[shape].plan

    def _all_kept(self, shape: Shape, device: torch.device) -> Chosen | None:
        """The plan that keeps everything, where it fits: it is found without weighing it against any other.

        New shapes come while the device waits for work, most often where there is memory to spare.
        """
        if self.given is not None or self._mode(device) == "least":
            return None
        costs = self._costs(shape, device, lambda estimates: (estimates[0].fastest(),))
        chosen = self._candidate(shape, device, costs, head.tiles_of(self._head())[0])
        return chosen if chosen.plan.fits and chosen.plan.cached_layers in (0, len(self.layers)) else None

    def _weighed(self, shape: Shape, device: torch.device) -> Chosen:
        """The best plan of all."""
        costs = self._costs(shape, device, levels_of)
        candidates = [self._candidate(shape, device, costs, tile) for tile in head.tiles_of(self._head())]
        return min(candidates, key=self._merit(device))

    def _candidate(self, shape: Shape, device: torch.device, layers: Costs, tile: LossTile) -> Chosen:
        """The best plan for a loss in tiles of one size."""
        hidden = int(self.traced[shape.autocast][-1].widths[INPUT] * shape.tokens)
        held, seconds = head.cost(self._head(), hidden, shape.tokens, tile)
        held -= head.still_free(self.model())[1] if shape.alone else 0
        costs, budget = replace(layers, head_bytes=held), self._budget(device)
        plan = self._choose(costs, shape, budget, device)
        if trailing := _trailing_bytes(plan):
            costs = replace(costs, head_bytes=held + trailing)
            plan = self._choose(costs, shape, budget, device)
        return Chosen(plan, costs, tile, seconds)

    def pass_seconds(self, tokens: int, longest: int, autocast: torch.dtype | None, alone: bool) -> float | None:
        """Seconds that a pass of documents takes, forward and backward; None where no plan of it fits."""
        device = self.device
        shape = documents_shape(tokens, longest, autocast, alone)
        return self._seconds(shape) if self.planned(shape, device).fits else None

    def waits_for_host(self, shape: Shape) -> bool:
        """Whether the device is done with a pass before the host has launched all of it."""
        return self._seconds(shape) <= PASS_SECONDS + LAUNCH_SECONDS * len(self.layers)

    def _seconds(self, shape: Shape) -> float:
        if shape not in self.seconds:
            self.seconds[shape] = self._estimated(shape)
        return self.seconds[shape]

    def _estimated(self, shape: Shape) -> float:
        layers = self.traced[shape.autocast]
        alone = {key: sum(layer.estimates(shape)[0].seconds) for key, layer in _kinds(layers).items()}
        trained, every = self._parameter_bytes
        # Backward has as many products as forward, and one more for each weight that trains.
        both_ways = 2 + trained / max(1, every)
        computing = both_ways * sum(alone[layer.key] for layer in layers)
        # Gradients are read, added to and written.
        computing += self.plans[shape].seconds() + 3 * trained / BYTES
        return max(PASS_SECONDS + computing, self.least_seconds)

    @property
    def least_seconds(self) -> float:
        """What a pass costs the host."""
        return PASS_SECONDS + LAYER_SECONDS * len(self.layers)

    @cached_property
    def _parameter_bytes(self) -> tuple[int, int]:
        """Of the parameters that train, and of all."""
        sizes = [(p.nbytes, p.requires_grad) for p in self._parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        model = self.model()
        return model.parameters() if model is not None else iter(())

    def begins_a_step(self) -> bool:
        """Whether no pass has left gradients."""
        trained = next((p for p in self._parameters() if p.requires_grad), None)
        return trained is None or trained.grad is None

    @property
    def saves_memory(self) -> bool:
        """Whether memory counts more than time."""
        return self._mode(self.device) == "least"

    def _choose(self, costs: Costs, shape: Shape, budget: int | None, device: torch.device) -> MemoryPlan:
        if self.given is not None:
            return self._follow(self.given, costs, shape, budget)
        return plans.choose(costs, budget, self._host(), self._mode(device))

    def _merit(self, device: torch.device) -> Callable[[Chosen], tuple[float, ...]]:
        """What to choose by: the peak where memory is all that counts or not enough, else time."""
        if self._mode(device) == "least":
            return lambda chosen: (chosen.plan.predicted_peak_bytes, chosen.seconds())
        return lambda chosen: (
            not chosen.plan.fits,
            chosen.seconds() if chosen.plan.fits else chosen.plan.predicted_peak_bytes,
        )

    def _follow(self, given: MemoryPlan, costs: Costs, shape: Shape, budget: int | None) -> MemoryPlan:
        """The given plan with what it costs in a pass of ``shape``."""
        known: dict[Any, Level] = {}
        levels = []
        for layer, level in zip(self.traced[shape.autocast], given.levels, strict=True):
            key = layer.key, level
            if key not in known:
                estimate = layer.estimate(layer.programs[0], shape)
                known[key] = replace(estimate.level(level.kept, level.offloaded), name=level.name)
            levels.append(known[key])
        peak = plans.peak_bytes(levels, given.cached_layers, costs)
        fits = budget is None or peak <= budget
        return MemoryPlan(tuple(levels), given.cached_layers, peak, budget, fits, shape.tokens)

    def tighten(self, shape: Shape, plan: MemoryPlan) -> MemoryPlan | None:
        """Plan the rest of the run with less than ``plan``, of ``shape``, took; the new plan, None where there is none.

        Nothing changes where ``plan`` is no longer the one of that shape.
        """
        chosen = self.plans[shape]
        if chosen.plan is not plan:
            return None
        costs = self._costs(shape, self.device, levels_of)
        costs = replace(costs, head_bytes=chosen.costs.head_bytes)
        tighter = plan.tighter(costs, self._host())
        if tighter is not None:
            self.limit, self.given = tighter.budget_bytes, None
            self.plans, self.seconds = {shape: chosen._replace(plan=tighter, costs=costs)}, {}
        return tighter

    # What it costs ----------------------------------------------------------------------------------------------

    def _trace(self, autocast: torch.dtype | None, device: torch.device) -> None:
        """See what the layers' values are under an autocast that has not been on before."""
        model = self.model()
        if autocast in self.traced or model is None:
            self.traced.setdefault(autocast, self.layers)
            return
        known: dict[Any, Layer] = {}
        try:
            # Dropout would draw its masks from the generator that the pass itself will draw from.
            with evaluating(model), torch.autocast(device.type, autocast):
                for layer in self.layers:
                    if layer.key not in known:
                        known[layer.key] = layer.traced_again(device)
        except RuntimeError as error:  # of a layer whose weights are elsewhere until its turn comes
            log.warning("the memory plan counts bytes as without autocast: %s", error)
            known = {layer.key: layer for layer in self.layers}
        self.traced[autocast] = [known[layer.key] for layer in self.layers]

    def _costs(
        self, shape: Shape, device: torch.device, levels: Callable[[Sequence[Estimate]], Sequence[Level]]
    ) -> Costs:
        """What a pass costs; ``levels`` says which of a layer there are to choose from. The head's bytes are 0."""
        known: dict[Any, tuple[tuple[Level, ...], int]] = {}
        layers, waiting = self.traced[shape.autocast], head.waiting_bytes(self.model())
        for key, layer in _kinds(layers).items():
            estimates = layer.estimates(shape)
            offered = [replace(lv, working_bytes=lv.working_bytes + waiting) for lv in levels(estimates)]
            known[key] = tuple(offered), estimates[0].forward_bytes()
        dense = tuple(layer.dense_bytes for layer in layers)
        return Costs(
            tokens=shape.tokens,
            layers=tuple(known[layer.key][0] for layer in layers),
            fixed_bytes=self._fixed(device, shape.alone) - (head.still_free(self.model())[0] if shape.alone else 0),
            head_bytes=0,
            forward_bytes=max(forward for _, forward in known.values()),
            # Made twice a pass.
            cached=Cached(dense, tuple(2 * DENSE_TRAFFIC * size / BYTES for size in dense)) if any(dense) else None,
        )

    def _fixed(self, device: torch.device, alone: bool) -> int:
        """What is on the device whatever the plan, in a pass that is alone in its step or not."""
        if self.fixed_bytes is None:
            self.fixed_bytes = self._held_by_training(device)
        return self.fixed_bytes + (0 if alone else self.waiting_bytes)

    def _held_by_training(self, device: torch.device) -> int:
        """As measured before the first pass, and what training will add."""
        trained = [p for p in self._parameters() if p.requires_grad]
        held = [getattr(p, "_local_tensor", p) for p in trained if p.grad is None]
        own = sum(getattr(p, "_local_tensor", p).numel() for p in trained)
        now = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        gradients, state = sum(t.nbytes for t in held), int(own * self.run.optimizer_bytes)
        if any(type(p).__name__ == "DTensor" for p in trained):
            # Of FSDP2: a pass that does not exchange its gradients leaves them whole.
            whole = sum(p.numel() * (self.run.gathers_as or p.dtype).itemsize for p in trained if p.grad is None)
            self.waiting_bytes = max(0, whole - gradients)
        return now + gradients + state + (sharded.gathered_bytes(self.layers) if self.is_sharded() else 0)

    def is_sharded(self) -> bool:
        """Whether parameters are gathered for the layer that runs: their memory comes and goes."""
        return self.run.sharding is not None or any(type(p).__name__ == "DTensor" for p in self._parameters())

    def _head(self) -> Any:
        """The model's head; None where it has none."""
        model: Any = self.model()
        return model.get_output_embeddings() if model is not None else None

    def _budget(self, device: torch.device) -> int | None:
        budget = self.shared_budget
        if budget is None:
            budget = device_budget(device, self.run.config)
        if budget is not None and self.is_sharded():
            budget = max(0, budget - sharded.streams_bytes(self.model(), self.layers, budget))
        return budget if self.limit is None else min(self.limit, budget or self.limit)

    def _host(self) -> int:
        return host_budget() if self.offloads else 0

    def _mode(self, device: torch.device) -> plans.Mode:
        """Without a device whose memory is known, the host's own choice stands: it checkpoints, or it does not."""
        mode = self.run.config.memory
        if self.limit is not None:
            return "auto"
        if mode == "auto" and device.type != "cuda" and self.run.gradient_checkpointing:
            return "least"
        return mode


def _kinds(layers: Sequence[Layer]) -> dict[Any, Layer]:
    """One of the layers of each kind."""
    return {layer.key: layer for layer in {id(layer): layer for layer in layers}.values()}


def _trailing_bytes(plan: MemoryPlan) -> int:
    """Bytes that are still on the device at the end of forward, though their levels send them away.

    What a layer sent is let go of after the next one has run, and none comes after the last; and the first layer's
    input, where it is a leaf that wants a gradient, is held by autograd itself.
    """
    leaving = [level.host_bytes for level in plan.levels if level.offloaded]
    if not leaving:
        return 0
    return leaving[0] + (leaving[-1] if plan.levels[-1].offloaded else 0)
