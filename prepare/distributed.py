"""The model on several ranks: replicated or sharded, and what a run of it is resumed from.

torch's modules for sharding take a second to import, so that is done where they are needed.
"""

import shutil
import warnings
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from prepare.checkpoint import load_checkpoint, write_checkpoint
from prepare.errors import CheckpointError
from prepare.ranks import rank, world


def distribute(model, sharded, device):
    """The module to call in training: a DistributedDataParallel of the model or, if sharded, the model itself, made an
    FSDP2 module whose transformer layers are gathered when their turn comes, and the rest, such as the embedding
    matrix that is also the output layer, when the model is called. Gradients are averaged over the ranks, in float32.

    Sharded weights keep their dtype (float32 where they are trained) and are gathered in the compute dtype.
    """
    if not dist.is_initialized():
        return model
    if not sharded:
        devices = None if device == "cpu" else [torch.cuda.current_device()]
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    options = {"mesh": dist.init_device_mesh(device, (world(),)), "mp_policy": MixedPrecisionPolicy(
        param_dtype=model.llm.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)}
    for layer in [*(model.encoder.encoder.layers if model.encoder is not None else []), *model.llm.model.layers]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def is_sharded(module):
    return hasattr(module, "unshard")


def last_backward(net, last):
    """A context for a batch of a step: only after the last one are the gradients brought together."""
    if is_sharded(net):
        net.set_requires_gradient_sync(last)
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def whole(model):
    """Inside, a sharded model is whole on every rank, so that its methods can be called like those of any other, without
    talking to the other ranks."""
    shards = [module for module in model.modules() if is_sharded(module)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def full(tensor):
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(model, parts):
    """The state dict of these parts of the model. If it is sharded, rank 0 gets it, in CPU memory; the others nothing."""
    state = {name: t for name, t in model.state_dict().items() if name.split(".")[0] in parts}
    if not is_sharded(model):
        return state
    found = ((name, full(tensor)) for name, tensor in state.items())  # one after the other; every rank takes part
    return {name: tensor.cpu() for name, tensor in found if rank() == 0}


# ----------------------------------------------------------------------------------------------------------------------
# What a run is resumed from: one file or, if the model is sharded, a file and a directory to which every rank writes


def save_resume(path, model, optimizer, state):
    """Writes what a run is resumed from. Every rank must take part; a state saved before is removed at the end."""
    directory = None
    if is_sharded(model):
        import torch.distributed.checkpoint as dcp
        directory = path.with_name(f"{path.stem}-{state['step']}-{state['validated']}")
        with told(directory, "what was saved before is intact: mend this and start again with --resume"):
            dcp.save(live_tensors(model, optimizer), checkpoint_id=directory)
        state = {**state, "model": {}, "shards": directory.name}
    else:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        state = {**state, "model": trained, "optimizer": optimizer.state_dict()}
    if rank() == 0:
        write_checkpoint(path, state)
        remove_shards(path, directory)


def remove_shards(path, but=None):
    for directory in path.parent.glob(f"{path.stem}-*"):
        if directory != but and directory.name.removeprefix(f"{path.stem}-").replace("-", "").isdigit():
            shutil.rmtree(directory)


def live_tensors(model, optimizer):
    """The trained parameters and AdamW's tensors by name, those that are in use and not copies."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {name: p.detach() for p, name in names.items() if p.requires_grad}
    return tensors | {f"{names[p]} {key}": t for p, state in optimizer.state.items() for key, t in state.items()}


def read_resume(path, config, may_change, total):
    """What save_resume wrote, without what is in shards. Raises CheckpointError if this run is not the one that wrote it:
    of another configuration, or of other than its `total` batches a step."""
    state = load_checkpoint(path)
    if "total" not in state:
        raise CheckpointError(f"{path}: is of an older version; start anew without --resume")
    for name, saved in state["config"].items():
        same = config.get(name) == saved or name == "accumulate" and total == state["total"]
        if name not in may_change and not same:
            raise CheckpointError(f"{path}: was trained with {name} {saved!r}, found {config.get(name)!r}; give the same, or "
                                  "start anew without --resume")
    return state


def load_resume(path, state, model, optimizer):
    """Puts the optimizer's state into place, and the weights if they were saved in shards, whatever the ranks were then
    and are now. state: what load_checkpoint gave, whose model has been restored. Raises CheckpointError."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if "shards" not in state:
        moments = {i: {key: share(t, parameters[i]) for key, t in found.items()}
                   for i, found in state["optimizer"]["state"].items()}
        optimizer.load_state_dict({**state["optimizer"], "state": moments})
        return
    import torch.distributed.checkpoint as dcp
    moments = {i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
               for i, p in enumerate(parameters)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    directory = path.with_name(state["shards"])
    with told(directory, f"{path.name} needs this directory beside it, as it was written"):
        dcp.load(live_tensors(model, optimizer), checkpoint_id=directory, no_dist=not is_sharded(model))


@contextmanager
def told(directory, remedy):
    """What goes wrong with shards on the disk, in one line."""
    from torch.distributed.checkpoint import CheckpointException
    try:
        with warnings.catch_warnings(action="ignore"):  # of one process that reads what several wrote
            yield
    except CheckpointException as error:  # no Exception
        reasons = {str(reason).splitlines()[0] for reason, _ in error.failures.values()}
        raise CheckpointError(f"{directory}: {'; '.join(sorted(reasons))}; {remedy}") from error


def share(tensor, parameter):
    """This rank's share of a tensor that all ranks have, split as the parameter is."""
    if not hasattr(parameter, "full_tensor") or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
