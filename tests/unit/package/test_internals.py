"""A failure here means: a package dropped a private part that we use, or a module uses one that is not listed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import longnet_dist
from longnet_dist import internals
from tests.unit.attention.flash_signatures import PARAMETERS

PACKAGE = Path(longnet_dist.__file__).parent
DOCUMENTED = {"os._exit", "from _typeshed import WriteableBuffer"}


def num_process_groups():
    return internals.num_process_groups() >= 0


def groups_of_their_own(folder):
    """Without a GPU, check that the device of eager initialisation can be put aside."""
    device = torch.device("cuda", 0)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/eager", 1), rank=0, world_size=1)
    try:
        dist.group.WORLD.bound_device_id = device
        with internals.groups_of_their_own():
            inside = dist.group.WORLD.bound_device_id
        after, dist.group.WORLD.bound_device_id = dist.group.WORLD.bound_device_id, None
        return inside is None and after == device
    finally:
        dist.destroy_process_group()


def abort_process_groups(folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/abort", 1), rank=0, world_size=1)
    internals.abort_process_groups()
    return not dist.is_initialized()


def default_store(folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    try:
        internals.default_store().set("a", "b")
        return internals.default_store().get("a") == b"b"
    finally:
        dist.destroy_process_group()


def forward_mode():
    outside = internals.is_in_forward_mode()
    with torch.autograd.forward_ad.dual_level():
        return internals.is_in_forward_mode() and not outside


def flash_attention():
    q = torch.ones(1, 1, 2, 8)
    out, lse = internals.cpu_flash_attention(q, q, q, 0.0, True)
    grads = internals.cpu_flash_attention_backward(q, q, q, q, out, lse, 0.0, True)
    return lse.shape == (1, 1, 2) and len(grads) == 3


def cpu_is_fast_in():
    return internals.cpu_is_fast_in(torch.float32) and internals.cpu_is_fast_in(torch.bfloat16) in (True, False)


def cuda_flash_attention():
    """Without a GPU, check that the operators have the arguments that are passed by name."""
    schemas = [getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema for name in ("forward", "backward")]
    return all("scale" in [argument.name for argument in schema.arguments] for schema in schemas)


def cudnn_attention():
    """Without a GPU, check the numbers and names of the operators' arguments, and that cumulative sizes may be None."""
    names = [
        [argument.name for argument in getattr(torch.ops.aten, f"_cudnn_attention_{name}").default._schema.arguments]
        for name in ("forward", "backward")
    ]
    return [len(x) for x in names] == [13, 16] and all(x[-1] == "scale" for x in names)


def flash_attn_2():
    return all(callable(internals.flash_attn(2, name)) for name in PARAMETERS[2, "2.7.4 to 2.8.3"])


def flash_attn_4():
    return all(callable(internals.flash_attn(4, name)) for name in PARAMETERS[4, "4.0.0b36"])


def python_unpickler():
    return internals.PythonUnpickler.dispatch[pickle.BUILD[0]] is internals.PythonUnpickler.load_build


def unshared_rendezvous():
    module = importlib.import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous")
    return internals.UNSHARED_RENDEZVOUS in inspect.getsource(module)


def checkpoint_metadata_names():
    return all(hasattr(importlib.import_module(module), name) for module, name in internals.CHECKPOINT_METADATA_NAMES)


def checkpoint_files(folder):
    dcp.save({"x": torch.zeros(1)}, checkpoint_id=folder, no_dist=True)
    return sorted(internals.checkpoint_files(folder, 0)) == sorted(path.name for path in folder.iterdir())


def file_system_reader():
    return {"fs", "path", "load_id"} <= vars(dcp.FileSystemReader("")).keys()


def parallel_style():
    from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

    return "_apply" in vars(ParallelStyle) and "_apply" in parallelize_module.__code__.co_names


def store_in_python():
    keys = []

    class Store(dist.Store):
        def set(self, key, value):
            keys.append(key)

    store = Store()  # torch keeps no reference to it.
    dist.PrefixStore("a", store).set("b", "c")
    return keys == ["a/b"]


def pickle_by_value():
    from ray import cloudpickle

    internals.pickle_by_value(module := sys.modules[__name__])
    cloudpickle.unregister_pickle_by_value(module)
    return True


def ray_address():
    return internals.ray_address("192.0.2.1:6379") == "192.0.2.1:6379"


def attention_implementation():
    from transformers import LlamaConfig

    return internals.attention_implementation(LlamaConfig(attn_implementation="eager")) == "eager"


def trainer_methods():
    """An override of a method that Trainer no longer has would never be called."""
    from transformers import Trainer

    from longnet_dist.integrations.hf_trainer import DilatedTrainer

    return overrides(DilatedTrainer, Trainer)


def accelerator_attributes():
    """Check the names in the code, because an Accelerator changes the state of the whole process."""
    from accelerate import Accelerator

    names = set(Accelerator.__init__.__code__.co_names)
    prepare = Accelerator.prepare_model.__code__
    return "_dataloaders" in names and "_is_accelerate_prepared" in {*prepare.co_names, *prepare.co_consts}


def strategy_methods():
    from lightning.pytorch.strategies import ModelParallelStrategy

    from longnet_dist.integrations.lightning import SequenceParallelStrategy

    return overrides(SequenceParallelStrategy, ModelParallelStrategy)


def tensor_parallel_axis():
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1)
    strategy._world_size = 8
    internals.fill_tensor_parallel_axis(strategy)
    read = ModelParallelStrategy.setup_environment.__code__.co_names
    return strategy._tensor_parallel_size == strategy.world_size and "_tensor_parallel_size" in read


def torchtitan_modules():
    from torchtitan.models.common.attention import GQAttention
    from torchtitan.protocols.module import Module

    return internals.configured_class(GQAttention.Config) is GQAttention and hasattr(Module, "_sharding_config")


def overrides(derived, base):
    """Return whether every public method of `derived` overrides one of `base`."""
    return all(hasattr(base, name) for name in vars(derived) if not name.startswith("_"))


CHECKS = {
    ("Python", "the unpickler in Python, and its methods per opcode"): python_unpickler,
    ("torch", "distributed_c10d._world.pg_names"): num_process_groups,
    ("torch", "distributed_c10d._get_default_store"): default_store,
    ("torch", "ProcessGroup.bound_device_id"): groups_of_their_own,
    ("torch", "distributed_c10d._abort_process_group"): abort_process_groups,
    ("torch", "cpu._is_avx512_bf16_supported"): cpu_is_fast_in,
    ("torch", "autograd.forward_ad._current_level"): forward_mode,
    ("torch", "aten._scaled_dot_product_flash_attention_for_cpu, with out and lse, and its backward"): flash_attention,
    ("torch", "aten._flash_attention_forward and its backward"): cuda_flash_attention,
    ("torch", "aten._cudnn_attention_forward and its backward"): cudnn_attention,
    ("flash-attn", "the private functions of flash_attn_interface"): flash_attn_2,
    ("flash-attn-4", "the private functions of cute.interface"): flash_attn_4,
    ("torch", internals.UNSHARED_RENDEZVOUS): unshared_rendezvous,
    ("torch", "the private names in a checkpoint's metadata"): checkpoint_metadata_names,
    ("torch", "the names of a checkpoint's files"): checkpoint_files,
    ("torch", "FileSystemReader's fs, path and load_id"): file_system_reader,
    ("torch", "ParallelStyle._apply"): parallel_style,
    ("torch", "stores that are written in Python"): store_in_python,
    ("ray", "cloudpickle.register_pickle_by_value"): pickle_by_value,
    ("ray", "services.canonicalize_bootstrap_address"): ray_address,
    ("transformers", "config._attn_implementation"): attention_implementation,
    ("transformers", "the methods of Trainer that DilatedTrainer overrides"): trainer_methods,
    ("accelerate", "Accelerator._dataloaders, and the mark _is_accelerate_prepared"): accelerator_attributes,
    ("lightning", "the methods of ModelParallelStrategy that SequenceParallelStrategy overrides"): strategy_methods,
    ("lightning", "ModelParallelStrategy._tensor_parallel_size and ._data_parallel_size"): tensor_parallel_axis,
    ("torchtitan", "Config._owner and Module._sharding_config"): torchtitan_modules,
}


@pytest.mark.filterwarnings("ignore")  # Packages warn when they are imported.
@pytest.mark.parametrize(("package", "part"), CHECKS)
def test_installed_packages_have_every_private_part_that_we_use(package, part, tmp_path):
    try:
        installed = f"{package} {platform.python_version() if package == 'Python' else version(package)}"
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    check, problem = CHECKS[package, part], ""
    try:
        exists = check(tmp_path) if "folder" in inspect.signature(check).parameters else check()
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        exists, problem = False, f" ({error!r})"
    assert exists, f"{installed} no longer has {part}{problem}: see longnet_dist/internals.py"


def test_no_other_module_accesses_private_parts():
    paths = [path for path in PACKAGE.rglob("*.py") if path != Path(internals.__file__)]
    accesses = [access for path in sorted(paths) for access in private_accesses(path)]
    assert not accesses, f"move these into longnet_dist/internals.py: {', '.join(accesses)}"


def private_accesses(path):
    """Yield each access of a module to a private attribute or name of another package."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    own = {"_longnet_dist"} | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}
    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            private, text = is_private(node.attr) and node.attr not in own, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(PACKAGE.name):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            private, text = any(map(is_private, names)), ast.unparse(node)
        else:
            continue
        if private and text not in DOCUMENTED:
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} {text}"


def is_private(name):
    return name.startswith("_") and not name.startswith("__")
