"""A PyTorch state dict as our tree, by a conversion table: the small form that parity tests use."""
import re

import jax.numpy as jnp
import numpy as np

from vino_jax.convert.rules import Table


def flatten(tree, prefix=""):
    """Nested dict -> {slash-joined path: leaf}."""
    flat = {}
    for name, value in tree.items():
        flat.update(flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def unflatten(flat):
    """{slash-joined path: leaf} -> nested dict."""
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def torch_names(table: Table, abstract) -> dict[str, tuple[str, int | None, object]]:
    """Torch name -> (our path, layer or None, op), for every rule, checking that rules and leaves match one to one."""
    leaves = flatten(abstract)
    paths = [rule.jax for rule in table.rules]
    assert sorted(paths) == sorted(leaves), f"rules and leaves differ: {sorted(set(paths) ^ set(leaves))}"
    names = {}
    for rule in table.rules:
        layers = range(leaves[rule.jax].shape[0]) if "{i}" in rule.torch else [None]
        for i in layers:
            name = rule.torch if i is None else rule.torch.replace("{i}", str(i))
            assert name not in names, f"{name} is named twice"
            names[name] = (rule.jax, i, rule.op)
    return names


def to_params(table: Table, state_dict: dict[str, np.ndarray], abstract):
    """Our tree of `abstract`'s shapes (float32) from `state_dict` (torch name -> numpy array); every name must be used or left out."""
    leaves, names, layers = flatten(abstract), torch_names(table, abstract), {}
    left_out = [name for name in state_dict if any(re.fullmatch(rule.torch, name) for rule in table.left_out)]
    unused = set(state_dict) - set(names) - set(left_out)
    assert not unused, f"no rule for {sorted(unused)}"
    for name, (path, i, op) in names.items():
        layers.setdefault(path, {})[i] = op.to_jax(np.asarray(state_dict[name], np.float32))
    flat = {}
    for path, parts in layers.items():
        value = parts[None] if None in parts else np.stack([parts[i] for i in range(len(parts))])
        assert value.shape == leaves[path].shape, f"{path}: {value.shape} against {leaves[path].shape}"
        flat[path] = jnp.asarray(value)
    for path, leaf in leaves.items():
        if path not in flat and leaf.shape[0] == 0:  # a stack without layers
            flat[path] = jnp.zeros(leaf.shape, jnp.float32)
    return unflatten(flat)
