"""R models of one architecture as one: a flat tensor ``theta`` [R, d] and one interface with two executors.

``vmap`` evaluates all members in batched kernels; ``loop`` evaluates member after member on views of the same
storage, for models that vmap cannot take or for which it does not pay. The loss of the stack is the sum over
members, so one backward pass gives all R gradients, and the Hessian is block-diagonal over members.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from lossray.errors import ModelError
from lossray.limits import WHOLE, Limits
from lossray.networks.ambient import random_state, seeded
from lossray.networks.as_found import as_found, copied, custom_parts
from lossray.networks.dropout import NoiseTape, replace_dropout
from lossray.networks.functional import call_model
from lossray.networks.layout import Layout, layout_of, tensors_of
from lossray.networks.nests import Inputs, described, rows
from lossray.networks.weight_norm import twice_differentiable
from lossray.seeds import stream

Loss = Callable[[Tensor, Tensor], Tensor]
Members = Mapping[str, Tensor]  # by name: of all members, [R, *shape], or of one, [*shape]
Value = TypeVar("Value")
EXECUTORS = ("vmap", "loop")


class Stack:
    """The architecture of a pack: evaluates R members whose weights the caller holds.

    Args:
        template: a model of the architecture; its own weights are never used, its mode is set on each call.
        layout: how ``theta`` divides into its trainable parameters.
        executor: "vmap" or "loop".

    Attributes:
        limits: how many members are evaluated together; the others wait, so that fewer activations are held.
    """

    def __init__(self, template: nn.Module, layout: Layout, *, executor: str) -> None:
        if executor not in EXECUTORS:
            raise ModelError(f"executor: found {executor!r}; allowed: {', '.join(EXECUTORS)}")
        self.template = template
        self.layout = layout
        self.executor = executor
        self.limits = WHOLE
        self.tape = NoiseTape()
        replace_dropout(template, self.tape)
        template.train()  # every layer, whatever its constructor left: the mode is read from the root's flag
        self._derivatives = twice_differentiable(template)
        self._custom_parts = custom_parts(template)
        self._places = _places(template)
        self._replaced: set[str] = set()  # buffers that forward passes replace, found in the recorded one
        self._noise_cache: dict[str, tuple[list[tuple[torch.Size, float]], bool]] = {}

    @property
    def dim(self) -> int:
        """Number of trainable parameters d of one member."""
        return self.layout.dim

    def with_executor(self, executor: str) -> "Stack":
        """The same architecture under another executor."""
        other = copy.copy(self)  # shares the template, whose dropout layers read this stack's tape
        other.executor = executor
        return other

    def limited(self, limits: Limits) -> "Stack":
        """The same stack, with no more of it in memory at once."""
        other = copy.copy(self)
        other.limits = limits
        return other

    def losses(
        self,
        theta: Tensor,
        buffers: Members,
        inputs: Inputs,
        targets: Tensor,
        loss: Loss,
        *,
        train: bool = False,
        keys: Sequence[int] | None = None,
        per_member: bool = False,
    ) -> Tensor:
        """Mean loss of every member.

        Args:
            theta: parameters [R, d].
            buffers: buffers by name, [R, *shape]; batch norm updates them in place when ``train``.
            inputs: [B, ...] shared by the members, or [R, B, ...] with ``per_member``; or a nest of such.
            targets: [B, ...] or [R, B, ...] accordingly.
            loss: ``loss(outputs, targets)``, the mean over the examples of one member.
            train: train mode (dropout active, batch statistics in batch norm); otherwise eval mode.
            keys: R noise seeds of this step; needed in train mode by models with dropout.
            per_member: whether each member has inputs of its own.

        Returns:
            Losses [R], differentiable in ``theta``.

        Raises:
            ModelError: random layers in train mode without ``keys``, or randomness that vmap cannot take.
        """
        function, args = self._loss_of(loss, train), (inputs, targets)
        values = self._in_groups(partial(self._values, function), theta, buffers, args, keys, per_member)
        return values[0] if len(values) == 1 else torch.cat(values)

    def gradients(
        self,
        theta: Tensor,
        buffers: Members,
        inputs: Inputs,
        targets: Tensor,
        loss: Loss,
        *,
        train: bool = False,
        keys: Sequence[int] | None = None,
        per_member: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Losses [R] and their gradients [R, d], detached; arguments as in `losses`.

        What differentiating `losses` gives, for less: the loop executor frees the graph of one member before
        it makes that of the next, and the parameters are the leaves, so that no graph leads back to theta.
        """
        function, args = self._loss_of(loss, train), (inputs, targets)
        groups = self._in_groups(partial(self._slopes, function), theta, buffers, args, keys, per_member)
        if len(groups) == 1:
            return groups[0]
        losses, gradients = zip(*groups, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def outputs(self, theta: Tensor, buffers: Members, inputs: Inputs, *, per_member: bool = False) -> Tensor:
        """Outputs of every member in eval mode, [R, B, ...]; arguments as in `losses`."""
        self._set_mode(False)
        evaluate = partial(self._values, self._call)
        values = self._in_groups(evaluate, theta, buffers, (inputs,), None, per_member)
        return values[0] if len(values) == 1 else torch.cat(values)

    def module(self, theta: Tensor, buffers: Members) -> nn.Module:
        """One member as a module of its own, in eval mode.

        Args:
            theta: its parameters [d].
            buffers: its buffers by name, [*shape].
        """
        model = copied(self.template)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in {**self.layout.split(theta), **buffers}.items():
                tensors[name].copy_(tensor)
        return model.eval()

    def _loss_of(self, loss: Loss, train: bool) -> Callable[..., Tensor]:
        """The loss of one member as a function of its tensors, inputs and targets."""
        self._set_mode(train)
        return lambda member, x, y: loss(self._call(member, x), y)

    def _batched(self, theta: Tensor) -> bool:
        """Whether vmap evaluates the members; a single one has nothing to gain from it."""
        return self.executor == "vmap" and len(theta) > 1

    def _in_groups(
        self,
        evaluate: Callable[..., Value],
        theta: Tensor,
        buffers: Members,
        args: tuple[Inputs, ...],
        keys: Sequence[int] | None,
        per_member: bool,
    ) -> list[Value]:
        """``evaluate`` of all members, or of as many at a time as the limits allow, in their order."""
        size = self.limits.members or len(theta)
        if size >= len(theta):
            return [evaluate(theta, buffers, args, keys, per_member)]
        groups = [slice(start, start + size) for start in range(0, len(theta), size)]
        return [
            evaluate(
                theta[group],
                {name: tensor[group] for name, tensor in buffers.items()},  # views: updated in place
                rows(args, group) if per_member else args,
                keys[group] if keys is not None else None,
                per_member,
            )
            for group in groups
        ]

    def _values(
        self,
        function: Callable[..., Tensor],
        theta: Tensor,
        buffers: Members,
        args: tuple[Inputs, ...],
        keys: Sequence[int] | None,
        per_member: bool,
    ) -> Tensor:
        """Value of every member, [R, ...], differentiable in theta."""
        evaluate = self._evaluator(function, theta, buffers, args, keys, per_member)
        if self._batched(theta):
            return evaluate(self.layout.split(theta))
        return torch.stack([evaluate(self.layout.split(row), r=r) for r, row in enumerate(theta.unbind())])

    def _slopes(
        self,
        function: Callable[..., Tensor],
        theta: Tensor,
        buffers: Members,
        args: tuple[Inputs, ...],
        keys: Sequence[int] | None,
        per_member: bool,
    ) -> tuple[Tensor, Tensor]:
        """Values [R] and gradients [R, d] of every member, detached."""
        evaluate = self._evaluator(function, theta, buffers, args, keys, per_member)
        if self._batched(theta):
            return self._differentiated(evaluate, theta)
        solos = [self._differentiated(partial(evaluate, r=r), row) for r, row in enumerate(theta)]
        losses, gradients = zip(*solos, strict=True)
        return torch.stack(losses), torch.stack(gradients)

    def _differentiated(self, evaluate: Callable[..., Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradient of all members [R, d], or of one [d]; both detached."""
        weights = self.layout.split(theta.detach())
        values = evaluate({name: piece.requires_grad_() for name, piece in weights.items()})
        pieces = torch.autograd.grad(values.sum(), list(weights.values()), materialize_grads=True)
        return values.detach(), torch.cat([piece.reshape(*theta.shape[:-1], -1) for piece in pieces], dim=-1)

    def _evaluator(
        self,
        function: Callable[..., Tensor],
        theta: Tensor,
        buffers: Members,
        args: tuple[Inputs, ...],
        keys: Sequence[int] | None,
        per_member: bool,
    ) -> Callable[..., Tensor]:
        """A function of the weights by name: of all members, [R, *shape], or of member r alone, [*shape]."""
        masks, ambient = self._masks(theta, buffers, args[0], keys, per_member)
        if ambient and self.executor == "vmap":
            raise ModelError("this model draws random numbers that vmap cannot give; use the loop executor")

        def played(member: Members, member_masks: tuple[Tensor, ...], *arguments: Inputs) -> Tensor:
            with self.tape.playing(member_masks):
                return function(member, *arguments)

        def evaluate(weights: Members, r: int | None = None) -> Tensor:
            if r is None:
                in_dims = (0, 0, *(0 if per_member else None for _ in args))
                batched = vmap(played, in_dims=in_dims, randomness="error")
                values: Tensor = batched({**weights, **buffers}, masks, *args)
                return values
            member = {**weights, **{name: tensor[r] for name, tensor in buffers.items()}}
            arguments = rows(args, r) if per_member else args
            seed = stream(keys[r], "ambient") if ambient and keys is not None else None
            with seeded(seed, theta.device):
                return played(member, tuple(mask[r] for mask in masks), *arguments)

        return evaluate

    def _call(self, member: Members, x: Inputs) -> Tensor:
        """The template's outputs with the tensors of one member: `functional_call` without its searches.

        In train mode buffers are updated in the member's own tensors, also where the forward pass replaces
        them. Those it gets as copies: autograd may have saved what it was given.
        """
        training = self.template.training
        kept = [(table, key, table[key]) for _, table, key in self._places]
        for name, table, key in self._places:
            table[key] = member[name].clone() if training and name in self._replaced else member[name]
        try:
            with self._derivatives(), as_found(self._custom_parts):
                outputs: Tensor = call_model(self.template, x)
            if training:
                self._update_replaced(member)
            return outputs
        finally:
            for table, key, tensor in kept:
                table[key] = tensor

    def _update_replaced(self, member: Members) -> None:
        for name, table, key in self._places:
            if table[key] is not member[name]:
                self._replaced.add(name)
                member[name].copy_(table[key].detach())

    def _set_mode(self, train: bool) -> None:
        if self.template.training != train:
            self.template.train(train)

    def _masks(
        self,
        theta: Tensor,
        buffers: Members,
        inputs: Inputs,
        keys: Sequence[int] | None,
        per_member: bool,
    ) -> tuple[tuple[Tensor, ...], bool]:
        """The dropout masks of this step, each [R, ...], and whether the model draws other random numbers."""
        if not self.template.training:
            return (), False
        calls, ambient = self._noise(theta, buffers, rows(inputs, 0) if per_member else inputs)
        if (calls or ambient) and keys is None:
            raise ModelError("this model is random in train mode: pass keys, one noise seed per member")
        if not calls or keys is None:
            return (), ambient
        drawn = [self.tape.draw(calls, key, theta.dtype) for key in keys]
        return tuple(torch.stack(masks).to(theta.device) for masks in zip(*drawn, strict=True)), ambient

    def _noise(
        self, theta: Tensor, buffers: Members, inputs: Inputs
    ) -> tuple[list[tuple[torch.Size, float]], bool]:
        """Dropout calls (mask shape, drop probability) of one forward pass, and whether it draws elsewhere.

        Found by one recorded pass for each shape of the inputs.
        """
        shape = described(inputs)
        if shape not in self._noise_cache:
            member = {name: tensor[0].detach().clone() for name, tensor in self.layout.split(theta).items()}
            member |= {name: tensor[0].clone() for name, tensor in buffers.items()}
            with torch.no_grad(), seeded(0, theta.device), self.tape.recording() as calls:
                before = random_state(theta.device)
                self._call(member, inputs)
                ambient = not torch.equal(before, random_state(theta.device))
            self._noise_cache[shape] = (calls, ambient)
        return self._noise_cache[shape]


def build_stack(
    build: Callable[[], nn.Module],
    seeds: Sequence[int],
    *,
    executor: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Stack, Tensor, dict[str, Tensor]]:
    """Initialise one member per seed, each from its own generator.

    Args:
        build: makes a freshly initialised model from torch's default generator, on the CPU.
        seeds: the members' seeds; a member's initialisation depends on its seed alone.
        executor: "vmap" or "loop".
        dtype: of parameters and floating buffers.
        device: where the stack lives.

    Returns:
        The stack, ``theta`` [R, d], and the buffers by name, [R, *shape] (frozen parameters among them).

    Raises:
        ModelError: no trainable parameter, members that differ in shape, or a `build` that seeds torch.
    """
    models = [_initialised(build, seed) for seed in seeds]
    return stack_models(models, executor=executor, dtype=dtype, device=device)


def stack_models(
    models: Sequence[nn.Module],
    *,
    executor: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Stack, Tensor, dict[str, Tensor]]:
    """Stack models that are there already: they are converted, and the first becomes the template.

    Args:
        models: of one architecture, made for this stack alone.
        executor: "vmap" or "loop".
        dtype: of parameters and floating buffers.
        device: where the stack lives.

    Returns:
        As `build_stack`.

    Raises:
        ModelError: no trainable parameter, or members that differ in shape.
    """
    models = [model.to(dtype) for model in models]
    layout = layout_of(models[0])
    rows = [_flat(model, layout) for model in models]
    others = [tensors_of(model)[1] for model in models]
    buffers = {name: torch.stack([tensors[name] for tensors in others]).to(device) for name in others[0]}
    stack = Stack(models[0].to(device), layout, executor=executor)
    return stack, torch.stack(rows).to(device), buffers


def _places(model: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Where a model keeps its parameters and buffers: name, table and key; tied ones have several places."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    names = {id(tensor): name for name, tensor in named}
    return [
        (names[id(tensor)], table, key)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]


def _initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    initial_seed = stream(seed, "initialisation")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(initial_seed)
        model = build()
        if torch.default_generator.initial_seed() != initial_seed:
            raise ModelError(
                "the model's function seeds torch's generator, so that all seeds would start alike: "
                "take torch.manual_seed out of it"
            )
    return model


def _flat(model: nn.Module, layout: Layout) -> Tensor:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = tuple(p.shape for p in parameters.values())
    if tuple(parameters) != layout.names or shapes != layout.shapes:
        raise ModelError(
            "the model's parameters differ from seed to seed: the members of a pack must share one shape"
        )
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])
