"""The parts that layers of every architecture are made of.

Weights may be stored wider than the computation (fp32 masters of what is trained); they are cast on use.

Legend: B rows, T tokens, C channels, V vocabulary, G mixes.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.layout import SegmentLayout
from src.model.casts import LayerCasts, WideProduct
from src.model.shape import Shape, matrices_of
from src.ops.elementwise import add_norm, squared_relu_and_gradient, squared_relu_gradient
from src.ops.node import Node, once
from src.ops.products import in_one_piece, reserved, spread
from src.quant import FrozenLinear

LAYER_NORM_EPS = 1e-5

OfTrained = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""From what was kept of a matrix's input to the gradients of what it has trained."""


class Linear(nn.Module):
    """y = x Wᵀ with W [out, in] in the file's orientation, cast to x's dtype when it is stored wider.

    Attributes:
        reserved: how many values there is memory for behind each row of W.
        room: how many of them lie there; till then W is contiguous.
    """

    reserved = room = 0

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    @property
    def in_features(self) -> int:
        """Width of x."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of y."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self._parameters["weight"]
        return F.linear(x, weight if weight.dtype is x.dtype else weight.to(x.dtype))

    def reserve(self, width: int, memory: Tensor | None = None) -> None:
        """Copies W to memory that takes `width` values more behind each of its rows; see `products.reserved`."""
        self.weight.data = reserved(self.weight.data, width, memory)
        self.reserved = width

    def make_room(self) -> None:
        """Has the rows of W lie with the room that was reserved behind each of them."""
        self.weight.data = spread(self.weight.data, self.reserved)
        self.room = self.reserved

    def trained(self) -> list[nn.Parameter]:
        """Whose gradients `gradients` gives: of a frozen matrix none, and a trained one is autograd's own."""
        return []

    def remembers(self) -> Tensor | None:
        """In a second pass over the layer what `kept` would compute, if the first one has left it."""
        return None

    def kept(self, x: Tensor, known: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the gradients of the trained parameters need of x; `known` is what it `remembers`."""
        return ()

    def product(self, x: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """y of x and of what was kept of it, outside autograd."""
        return self(x)  # type: ignore[no-any-return]

    def add_product(self, x: Tensor, y: Tensor) -> None:
        """Adds the product of x [n, in] to y [n, out], in place, outside autograd; a sum in fp32, rounded once."""
        y.addmm_(x, self.weight.to(x.dtype).t())

    def gradient_into(self, grad_output: Tensor, grad_x: Tensor) -> None:
        """From the gradient of y [n, out] to that of x [n, in], in memory that is there, outside autograd."""
        torch.mm(grad_output, self.weight.to(grad_output.dtype), out=grad_x)

    def add_gradient(self, grad_output: Tensor, grad_x: Tensor) -> None:
        """Adds what the gradient of y [n, out] is to x to grad_x [n, in], as `add_product` does."""
        grad_x.addmm_(grad_output, self.weight.to(grad_output.dtype))

    def gradients(self, grad_output: Tensor) -> tuple[Tensor, OfTrained]:
        """From the gradient of y: that of x, and a function from what was kept to those of `trained`.

        Outside autograd. An adapter in this matrix's place answers the same questions.
        """
        return grad_output @ self.weight.to(grad_output.dtype), lambda kept: ()


class Joint(ABC):
    """A matrix that computes with others at once, in fewer launches, if they are alike: see `together`.

    Attributes:
        room: how many values its inputs are to have room for behind each of their rows.
    """

    room = 0

    @abstractmethod
    def take_room(self) -> None:
        """From now on, wants inputs with `room`, if it computes better with them."""

    @abstractmethod
    def joins(self, others: Sequence[object]) -> bool:
        """Whether these are alike."""

    @classmethod
    @abstractmethod
    def joint(cls, matrices: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The product of each with its input [..., in]."""

    @classmethod
    @abstractmethod
    def joint_kept(
        cls, matrices: Sequence[Any], inputs: Sequence[Tensor], known: Sequence[Tensor | None] = ()
    ) -> list[tuple[Tensor, ...]]:
        """`kept` of each, outside autograd; inputs are [n, in]."""


def join(matrices: Sequence[object]) -> bool:
    """Whether matrices, all with an input of the same width, compute at once."""
    first, *others = matrices
    return isinstance(first, Joint) and first.joins(others)


def together(matrices: Sequence[Linear], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The product of each matrix with its input [..., in], at once where they join.

    That is the better the more of the inputs lie side by side, see `ops.products`.
    """
    kind: Any = type(matrices[0])
    if join(matrices):
        products: tuple[Tensor, ...] = kind.joint(matrices, inputs)
        return products
    return tuple(matrix(x) for matrix, x in zip(matrices, inputs, strict=True))


def kept_together(
    matrices: Sequence[Linear], inputs: Sequence[Tensor], known: Sequence[Tensor | None]
) -> list[tuple[Tensor, ...]]:
    """`kept` of each matrix, at once where they join; inputs are [n, in]."""
    kind: Any = type(matrices[0])
    if join(matrices):
        kept: list[tuple[Tensor, ...]] = kind.joint_kept(matrices, inputs, known)
        return kept
    return [matrix.kept(x, own) for matrix, x, own in zip(matrices, inputs, known, strict=True)]


def squared_relu_gradients(
    value: Any, key: Tensor, grad_hidden: Tensor, known: Tensor | None, of_value: OfTrained
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The backward of `value(squared_relu(key))` behind value's own product: what of it needs key.

    Args:
        value: a matrix.
        key: [n, F], computed again; its memory may be used up.
        grad_hidden: [n, F], of value's input; used up.
        known: what value `remembers`.
        of_value: of `value.gradients`.

    Returns:
        The gradient of key, and those of what value has trained.
    """
    if not value.trained():
        return squared_relu_gradient(key, grad_hidden), ()
    if known is not None and not value.keeps_input:
        return squared_relu_gradient(key, grad_hidden), of_value(value.kept(key, known))
    squared, grad_key = squared_relu_and_gradient(key, grad_hidden)
    return grad_key, of_value(value.kept(squared, known))


class Norm(nn.LayerNorm):
    """LayerNorm over C whose weights may be stored wider than its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_sum(x, None)[1]

    def of_sum(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm), [B, T, C] each; None adds nothing."""
        own: Any = self._parameters  # an attribute of a module takes ten times as long
        return add_norm(x, delta, own["weight"], own["bias"], self.eps)


class Embedding(nn.Module):
    """Token embedding that may stay on the host.

    A frozen table is read only T rows at a time, so it can remain in host memory (`keep_on_host`);
    it is then not registered with the module and never copied whole.

    Attributes:
        gives_rows: whether the gradient of a trained table is sparse: of the rows that were read.
    """

    gives_rows = False

    def __init__(self, vocab_size: int, channels: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(vocab_size, channels))
        self.host_table: Tensor | None = None

    def keep_on_host(self, table: Tensor) -> None:
        """Serves from `table` [V, C] on the CPU and drops the registered parameter."""
        self.weight = None
        self.host_table = table

    def look_up(self, tokens: Tensor, *, pinned: bool) -> Tensor:
        """tokens int64 [B, T] -> [B, T, C] of a table on the host; the tokens themselves of one on the device."""
        table = self.host_table
        if table is None:
            return tokens
        rows = torch.empty(tokens.numel(), table.shape[1], dtype=table.dtype, pin_memory=pinned)
        torch.index_select(table, 0, tokens.reshape(-1).cpu(), out=rows)
        return rows.view(*tokens.shape, -1)

    def forward(self, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """tokens int64 [B, T], or what `look_up` made of them -> [B, T, C] on `device`."""
        if self.weight is not None:
            return F.embedding(tokens.to(self.weight.device), self.weight, sparse=self.gives_rows).to(device, dtype)
        rows = tokens if tokens.is_floating_point() else self.look_up(tokens, pinned=device.type == "cuda")
        return rows.to(device, non_blocking=True).to(dtype)


class Mixer(nn.Module, ABC):
    """Base of time and channel mixes: empty weights by a table of names and shapes.

    A matrix `NAME.weight` becomes a `Linear`, any other name without a dot a parameter; what remains is the
    subclass's to make.

    Attributes:
        mixed: names of matrices that are applied to mixes of z which nothing else takes, and which compute at once if
            they join.
        products: parameters that stand in products of their own beside the matrices.
        stacks: vectors that are used as one tensor, see `stacked`.
    """

    mixed: ClassVar[tuple[str, ...]]
    products: ClassVar[tuple[str, ...]] = ()
    stacks: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        self._used: list[nn.Module | None] = []
        self._packed: tuple[FrozenLinear, ...] = ()
        for name in matrices_of(shapes):
            out_features, in_features = shapes[name]
            self.add_module(name.removesuffix(".weight"), Linear(in_features, out_features))
        for name, shape in shapes.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._stacks: dict[tuple[str, ...], tuple[list[Tensor], list[int], Tensor]] = {}
        self._casts: LayerCasts | None = None
        self._cast_names: tuple[str, ...] = ()
        self._first_cast = 0

    def cast_with(self, layer: LayerCasts) -> None:
        """From now on, what `product` needs and is trained in fp32 is cast with others of its layer."""
        if self._casts is None:
            own = {name: parameter for name, parameter in self._parameters.items() if name in self.products}
            self._cast_names = tuple(
                n for n, p in own.items() if p is not None and p.requires_grad and p.dtype is torch.float32
            )
            self._casts, self._first_cast = layer, layer.add(self)

    def trained(self) -> list[Tensor]:
        """What is cast together, see `casts.HasTrained`."""
        return [getattr(self, name) for name in self._cast_names]

    def narrow(self, name: str, dtype: torch.dtype) -> Callable[[], Tensor] | None:
        """What gives a parameter in a narrower dtype, outside autograd; None where it is not cast with others."""
        casts = self._casts
        if casts is None or name not in self._cast_names or dtype is torch.float32:
            return None
        number = self._first_cast + self._cast_names.index(name)
        return lambda: casts.cast(number, dtype)

    def product(self, x: Tensor, name: str, bias: str = "") -> Tensor:
        """x [..., in] @ the parameter [in, out], plus another one [..., out] if it is named, in x's dtype."""
        own: Any = self._parameters
        weight: Tensor = own[name]
        added: Tensor | None = own[bias] if bias else None
        cast = self.narrow(name, x.dtype)
        if cast is not None:
            added_cast = (self.narrow(bias, x.dtype) if bias else None) or (lambda: getattr(self, bias).to(x.dtype))
            wide: Tensor = WideProduct.apply(x, weight, added, cast, added_cast)
            return wide
        dtype = x.dtype
        weight = weight if weight.dtype is dtype else weight.to(dtype)
        if added is None:
            return x @ weight
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(added.to(dtype).view(-1), rows, weight).view(*x.shape[:-1], -1)

    def stacked(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """The named [1, 1, C] vectors as one [G, C] tensor.

        Frozen ones are stacked once, in `like`'s dtype, and again when one is replaced or written in place. Trained
        ones are where they are if they are in one piece, and else copied.
        """
        own: Any = self._parameters
        vectors: list[Tensor] = [own[name] for name in names]
        if len(names) == 1:
            return vectors[0].view(1, -1)
        for vector in vectors:
            if vector.requires_grad:
                if in_one_piece(vectors):
                    whole: Tensor = _InOnePiece.apply(*vectors)
                    return whole
                return torch.cat(vectors).view(len(names), -1)
        versions = [vector._version for vector in vectors]
        known, seen, stack = self._stacks.get(names, ([], [], like))
        same = seen == versions and all(map(operator.is_, known, vectors))
        if not (same and stack.dtype is like.dtype and stack.device == like.device):
            stack = torch.cat(vectors).view(len(names), -1).to(like.dtype)
            self._stacks[names] = vectors, versions, stack
        return stack

    def placed(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """What to register by this name for a weight: it, or one of its values that lies where this mixer likes it."""
        return weight

    @torch.no_grad()
    def lay_in_one_piece(self) -> None:
        """Moves trained vectors to where those that are stacked follow each other."""
        for names in self.stacks:
            vectors = [self._parameters[name] for name in names]
            if not all(vector is not None and vector.requires_grad for vector in vectors):
                continue
            if len({vector.dtype for vector in vectors if vector is not None}) == 1:
                for vector, place in zip(vectors, torch.stack(vectors).unbind(), strict=True):  # type: ignore[arg-type]
                    vector.data = place  # type: ignore[union-attr]

    def take_room(self) -> None:
        """Has matrices that are applied to mixes use the room that was reserved for them."""
        for matrix in self._mixed:
            if isinstance(matrix, Joint):
                matrix.take_room()

    @property
    def _mixed(self) -> tuple[Linear, ...]:
        """The matrices of these names."""
        own: Any = self._modules  # an attribute of a module takes ten times as long
        return tuple([own[name] for name in self.mixed])

    @abstractmethod
    def mixing_parameters(self) -> list[nn.Parameter]:
        """The parameters that `mixed_inputs` uses."""


class _InOnePiece(Node):
    """Vectors [1, 1, C] that follow each other in memory, as one tensor [G, C] there."""

    @staticmethod
    def forward(ctx: Any, *vectors: Tensor) -> Tensor:
        first = vectors[0]
        ctx.shape = first.shape
        return first.detach().as_strided((len(vectors), first.numel()), (first.numel(), 1))

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.view(-1, *ctx.shape).unbind()
        return tuple(part if need else None for part, need in zip(parts, ctx.needs_input_grad, strict=True))


class TimeMixer(Mixer):
    """The part of a layer that looks back: z = ln1 x [B, T, C] -> what is added to x.

    Attributes:
        matrices: names of the matrices.
        output: the last of them, applied to what `attend` returns.
        hands_on: whether `attend` makes a value that all later layers take.
        time_state: [H, N, N] fp32 (head, value, key), where the recurrence starts without a carried memory.
    """

    matrices: ClassVar[tuple[str, ...]]
    output: Linear
    time_state: nn.Parameter
    hands_on = False

    def dequantize(self) -> None:
        """Has the packed matrices ready by one launch, where they have buffers of their own; `attend` begins so."""
        modules = self._modules
        used = [modules[name] for name in self.matrices]
        if used != self._used:
            bare = [getattr(module, "base", module) for module in used]
            self._used, self._packed = used, tuple(matrix for matrix in bare if isinstance(matrix, FrozenLinear))
        if self._packed:
            self._packed[0].workspace.fill_together(self._packed)

    @abstractmethod
    def has_kernel(self, device: torch.device) -> bool:
        """Whether the operator runs as a kernel on this GPU in bf16, so that nothing in it waits for the host."""

    @abstractmethod
    def mixed_inputs(
        self, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None, *, keeps_modulation: bool = False
    ) -> tuple[Tensor, ...]:
        """What the matrices are applied to, [B, T, C] each.

        Element-wise work and narrow products: cheap to compute again, several times z to keep; so is the modulation.

        Args:
            z: [B, T, C], normalised input; B is 1 with a layout.
            shift: [B, C], what stands before each row's first token; None is zero. Excludes a layout.
            layout: segments of a packed row.
            keeps_modulation: see `ops.elementwise.modulated_shift_mixes`.
        """

    @abstractmethod
    def attend(
        self, inputs: tuple[Tensor, ...], start: Tensor | None, layout: SegmentLayout | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The recurrence and its gate on `mixed_inputs`.

        Args:
            inputs: of `mixed_inputs`.
            start: carried matrices [B, H, N, N] fp32, with a layout [roots, H, N, N]; None starts from `time_state`.
            layout: segments of a packed row.
            handed: [B, T, A], what the layer that `hands_on` made; None before it, and where none does.

        Returns:
            (what `output` is applied to [B, T, A], final matrices [B, H, N, N] fp32, or [roots, H, N, N] with a
            layout: those of the root segments, what is handed on [B, T, A] or None).
        """

    def handed_parameters(self) -> list[nn.Parameter]:
        """The parameters that what is handed on depends on."""
        return []


class ChannelMixer(Mixer):
    """The feed-forward part of a layer: z = ln2 x [B, T, C] and x -> the new residual stream."""

    @abstractmethod
    def mixed_inputs(self, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None) -> tuple[Tensor, ...]:
        """What the matrices are applied to, [B, T, C] each; arguments as for `TimeMixer.mixed_inputs`."""

    @abstractmethod
    def feed(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The matrices on `mixed_inputs`: residual stream x [B, T, C] -> the new one.

        Outside autograd that may take x's place.
        """

    @abstractmethod
    def feed_again(self, x: Tensor, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """`feed` when its result is known: computes only what the backward needs, and there."""

    @abstractmethod
    def can_feed_again(self) -> bool:
        """Whether `feed_again` can take the place of `feed`: where no matrix is trained but by an adapter beside it."""
