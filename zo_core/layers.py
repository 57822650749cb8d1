"""Transformer blocks as sets of tensors, and which of them a step leaves out (LeZO)."""

from collections.abc import Sequence

from torch import Tensor, nn

from .noise import LAYER_ORDER, permutation

Blocks = str | Sequence[nn.Module]


def find_blocks(module: nn.Module | None, blocks: Blocks | None = None) -> list[nn.Module]:
    """The repeated blocks of a model: the ``nn.ModuleList`` of at least two modules that has most parameters.

    Where there is none, the blocks of one class in an ``nn.Sequential``, of modules of their own, that have most.

    Args:
        module: the model.
        blocks: instead, the dotted name of a list in it, or the modules themselves.

    Raises:
        ValueError: no module, no such list, or fewer than two blocks.
        TypeError: blocks that are no modules.
    """
    if module is None and not (blocks and not isinstance(blocks, str)):
        raise ValueError("blocks: expected a module to find them in, or the blocks themselves: pass module= or blocks=")
    if isinstance(blocks, str):
        assert module is not None
        try:
            named = module.get_submodule(blocks)
        except AttributeError as error:
            raise ValueError(f"blocks: expected the name of a list of modules, got {blocks!r}: {error}") from None
        if not isinstance(named, nn.ModuleList | nn.Sequential):
            raise ValueError(f"blocks: expected the name of a list of modules, {blocks!r} is a {type(named).__name__}")
        blocks = list(named)
    elif blocks is None:
        assert module is not None
        lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        lists = lists or [found for m in module.modules() if isinstance(m, nn.Sequential) and (found := _repeated(m))]
        if not lists:
            raise ValueError(
                "blocks: expected a model with an nn.ModuleList of blocks, or an nn.Sequential of several of one class, found none "
                f"in {type(module).__name__}: name it"
            )
        sizes = [sum(p.numel() for block in found for p in block.parameters()) for found in lists]
        blocks = lists[sizes.index(max(sizes))]
    if wrong := [b for b in blocks if not isinstance(b, nn.Module)]:
        raise TypeError(f"blocks: expected modules, got {type(wrong[0]).__name__}")
    if len(blocks) < 2:
        raise ValueError(f"blocks: expected at least two to choose from, got {len(blocks)}")
    return list(blocks)


def _repeated(sequence: nn.Sequential) -> list[nn.Module]:
    """The modules of the class that a sequence has most of, if there are several and they consist of others."""
    composed = [m for m in sequence if next(m.parameters(), None) is not None and next(m.children(), None) is not None]
    kinds = dict.fromkeys(
        type(m) for m in composed if type(m) is not nn.Sequential
    )  # which says nothing of what is in it
    found = max(([m for m in composed if type(m) is kind] for kind in kinds), key=len, default=[])
    return found if len(found) > 1 else []


def tensors_of(blocks: Sequence[nn.Module], tensors: Sequence[Tensor], module: nn.Module | None) -> list[set[int]]:
    """Numbers of the tensors in each block, without those that are also used outside the blocks.

    A tensor that several blocks share (ALBERT) is in each of them, and is left out when all of these are.

    Raises:
        ValueError: none of the tensors is in any block.
    """
    numbers = {id(p): i for i, p in enumerate(tensors)}
    inside = {m for block in blocks for m in block.modules()}
    others = [m for m in module.modules() if m not in inside] if module is not None else []
    outside = {id(p) for m in others for p in m._parameters.values()}
    sets = [{numbers[id(p)] for p in b.parameters() if id(p) in numbers and id(p) not in outside} for b in blocks]
    if not any(sets):
        raise ValueError("blocks: expected blocks of the model, none of the trained tensors is in one of them")
    return sets


def left_out(blocks: Sequence[set[int]], rho: float, *, seed: int, step: int) -> set[int]:
    """Numbers of the tensors that a step leaves out: floor(rho n) of n blocks, a pure function of seed and step."""
    count = int(rho * len(blocks) + 1e-9)  # 0.7 * 10 is 7
    if not count:
        return set()
    order = permutation(len(blocks), seed=seed, stream=step % (1 << 32), purpose=LAYER_ORDER).tolist()
    return set().union(*(blocks[i] for i in order[:count])).difference(*(blocks[i] for i in order[count:]))
