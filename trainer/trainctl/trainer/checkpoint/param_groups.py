"""Whether an optimizer's parameter groups are those that a checkpoint was made with.

A commit cannot fit one into the other, and finds that out after it has written into the models. So it is found here.
"""

from trainctl.trainer.checkpoint.capture import Captured
from trainctl.trainer.checkpoint.errors import CheckpointError
from trainctl.trainer.checkpoint.state import State
from trainctl.trainer.checkpoint.tree import Node, decode


def compare_groups(state: State, live: Captured, shared: dict[str, Node]) -> None:
    """Raises CheckpointError, naming the optimizer, where it has other groups, or groups of another size, than it had.

    An optimizer whose state has no groups is passed over, and so is one with a hook that may make a state fit before
    it is loaded (`Optimizer.register_load_state_dict_pre_hook`).
    """
    for index, optimizer in enumerate(state.optimizers):
        name = f"optimizer.{index}"
        if getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None):
            continue
        saved, now = _sizes(shared[name]), _sizes(live.nodes[name])
        if saved is not None and now is not None and saved != now:
            raise CheckpointError(
                f"{name} ({type(optimizer).__name__}) had {_in_words(saved)} in the checkpoint and has "
                f"{_in_words(now)} in the run: nothing was changed. Give it the groups that it had then "
                "(add_param_group before Run.attach, for a restart), or take one that was made since they changed"
            )


def _sizes(node: Node) -> list[int] | None:
    """The number of parameters of every group of an optimizer's state_dict, None where it has no such groups."""
    content = decode(node, lambda _name, _device: None)
    groups = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        return None
    return [len(group["params"]) for group in groups]


def _in_words(sizes: list[int]) -> str:
    counts = ", ".join(str(size) for size in sizes)
    return f"{len(sizes)} parameter group{'s' * (len(sizes) != 1)} (of {counts} parameters)"
