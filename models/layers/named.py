"""Modules by the names that data has: a modality may be called "audio.v2" or "keys"."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView

from torch import nn


class Named(nn.ModuleDict):
    """nn.ModuleDict for any names. Its own refuses dots and the names of its methods.

    Such names are stored encoded ("audio%2Ev2", "keys%"), all others as they are, so that weights keep their names.
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_encoded(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(_encoded(key), module)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(_encoded(key))

    def __iter__(self) -> Iterator[str]:
        return map(_decoded, super().__iter__())

    def keys(self) -> KeysView[str]:
        return dict.fromkeys(self).keys()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, nn.Module]:
        return {name: self[name] for name in self}.items()


def _encoded(name: str) -> str:
    found = name.replace("%", "%25").replace(".", "%2E")
    return f"{found}%" if not found or hasattr(nn.ModuleDict, found) or found in _OWN else found


def _decoded(key: str) -> str:
    return key.removesuffix("%").replace("%2E", ".").replace("%25", "%")


# Attributes that a ModuleDict has once it is made.
_OWN = frozenset(vars(nn.ModuleDict()))
