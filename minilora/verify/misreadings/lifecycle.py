"""A layer whose adapters come and go, misread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minilora.verify.misreadings.entry import Misreading, equivalents, family
from minilora.verify.misreadings.plain import Array, Plain


class Session:
    """A right session, written as libraries have it: a weight that is changed in place."""

    def __init__(self, my: Plain, layer: Mapping[str, Any]) -> None:
        self.kind = layer["kind"]
        if self.kind not in ("linear", "conv1d", "embedding"):
            raise NotImplementedError(f"no layer of kind {self.kind}")
        self.my, self.W = my, self.read(layer["W"])
        self.b = layer.get("bias", 0 * self.W[:, 0])
        self.known: dict[str, Mapping[str, Any]] = {}
        self.factor: dict[str, float] = {}
        self.active: list[str] = []
        self.added: dict[str, Array] = {}
        """What each merged adapter has added to the weight."""
        self.off = False
        self.training = False

    def read(self, W: Array) -> Any:
        """The matrix (m, n) of a weight as it is given: of a table its transpose."""
        return W.T if self.kind == "embedding" else W

    def delta(self, name: str) -> Any:
        """factor · s B A."""
        return self.factor[name] * self.my.delta(self.my.adapter(self.known[name]))

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Known, and no more."""
        if name in self.known:
            raise ValueError(f"{name} is there")
        self.known[name], self.factor[name] = adapter, 1.0

    def activate(self, names: Sequence[str]) -> None:
        """Just these, and the switch on."""
        for name in [name for name in self.added if name not in names]:
            self.take_out(name)
        self.active, self.off = list(names), False

    def disable(self) -> None:
        """The switch off."""
        self.off = True

    def scale(self, name: str, factor: float) -> None:
        """Another factor; what is merged is exchanged."""
        merged = name in self.added
        if merged:
            self.take_out(name)
        self.factor[name] = factor
        if merged:
            self.put_in(name)

    def put_in(self, name: str) -> None:
        """Into the weight."""
        self.added[name] = self.delta(name)
        self.W = self.W + self.added[name]

    def take_out(self, name: str) -> None:
        """Out of the weight."""
        self.W = self.W - self.added.pop(name)

    def merge(self) -> None:
        """What is active and not merged."""
        for name in self.active:
            if name not in self.added:
                self.put_in(name)

    def unmerge(self) -> None:
        """All that is merged."""
        for name in list(self.added):
            self.take_out(name)

    def delete(self, name: str) -> None:
        """With all that it did."""
        if name in self.added:
            self.take_out(name)
        self.active = [other for other in self.active if other != name]
        del self.known[name], self.factor[name]

    def train(self) -> None:
        """Training."""
        self.training = True

    def eval(self) -> None:
        """Evaluation."""
        self.training = False

    def base(self) -> Any:
        """The weight without what is merged."""
        return self.W - sum(self.added.values(), start=0 * self.W)

    def acting(self) -> Any:
        """The weight that acts."""
        if self.off:
            return self.base()
        names = [name for name in self.active if name not in self.added]
        return sum((self.delta(name) for name in names), start=self.W)

    def forward(self, x: Array) -> Array:
        """y, tokens in rows."""
        if self.kind == "embedding":
            rows: Array = self.acting().T[x]
            return rows
        y: Array = (x @ self.acting().T + self.b).astype(x.dtype)
        return y

    def weight(self) -> Array:
        """The weight as it is stored."""
        W: Array = self.read(self.W)
        return W


class Planned(Session):
    """The same from the original weight each time."""

    def put_in(self, name: str) -> None:
        """Noted."""
        self.added[name] = 0 * self.W

    def take_out(self, name: str) -> None:
        """Struck out."""
        del self.added[name]

    def base(self) -> Any:
        """The original."""
        return self.W

    def acting(self) -> Any:
        """The original and all that acts."""
        names = [] if self.off else self.active
        return sum((self.delta(name) for name in names), start=self.W)

    def weight(self) -> Array:
        """The original and what is merged."""
        total: Array = self.read(sum((self.delta(name) for name in self.added), start=self.W))
        return total


class Refusing(Session):
    """With errors where another passes over, or exchanges what is merged."""

    def merge(self) -> None:
        """Once."""
        if self.added or not self.active:
            raise RuntimeError("merged already, or nothing to merge")
        super().merge()

    def unmerge(self) -> None:
        """Once."""
        if not self.added:
            raise RuntimeError("not merged")
        super().unmerge()

    def delete(self, name: str) -> None:
        """Not while merged."""
        if name in self.added:
            raise RuntimeError("unmerge first")
        super().delete(name)

    def scale(self, name: str, factor: float) -> None:
        """Not while merged."""
        if name in self.added:
            raise RuntimeError("unmerge first")
        super().scale(name, factor)


def _sessions(kind: type[Session]) -> Callable[[], Plain]:
    return type("Lived", (Plain,), {"session": lambda my, layer: kind(my, layer)})


def _but(**methods: Any) -> Callable[[], Plain]:
    """`Plain` whose session has other methods."""
    return _sessions(type("Wrong", (Session,), methods))


def _merge_again(my: Session) -> None:
    for name in my.active:
        my.W = my.W + my.delta(name)
        my.added[name] = my.delta(name)


def _unmerge_again(my: Session) -> None:
    for name in my.active:
        my.W = my.W - my.delta(name)
        my.added.pop(name, None)


def _unmerge_anew(my: Session, name: str) -> None:
    my.added.pop(name)
    my.W = my.W - my.delta(name)


def _scale_alone(my: Session, name: str, factor: float) -> None:
    my.factor[name] = factor


def _scale_piled(my: Session, name: str, factor: float) -> None:
    Session.scale(my, name, my.factor[name] * factor)


def _scale_of_all(my: Session, name: str, factor: float) -> None:
    for each in my.known:
        Session.scale(my, each, factor)


def _add_active(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    Session.add(my, name, adapter)
    my.active.append(name)


def _add_into_merged(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    Session.add(my, name, adapter)
    if my.added:
        my.active.append(name)
        my.put_in(name)


def _add_forgets_merged(my: Session, name: str, adapter: Mapping[str, Any]) -> None:
    Session.add(my, name, adapter)
    my.added = {}


def _activate_more(my: Session, names: Sequence[str]) -> None:
    Session.activate(my, [*my.active, *(name for name in names if name not in my.active)])


def _activate_one(my: Session, names: Sequence[str]) -> None:
    Session.activate(my, names[:1])


def _activate_some(my: Session, names: Sequence[str]) -> None:
    Session.activate(my, names or my.active)


def _activate_over_merged(my: Session, names: Sequence[str]) -> None:
    my.active, my.off = list(names), False


def _activate_still_off(my: Session, names: Sequence[str]) -> None:
    off = my.off
    Session.activate(my, names)
    my.off = off


def _delete_leaves_merged(my: Session, name: str) -> None:
    my.added.pop(name, None)
    Session.delete(my, name)


def _delete_leaves_branch(my: Session, name: str) -> None:
    delta = my.delta(name) if name in my.active and name not in my.added else 0 * my.W
    Session.delete(my, name)
    my.W = my.W + delta


def _delete_all_rest(my: Session, name: str) -> None:
    Session.delete(my, name)
    my.active = []


def _delete_next(my: Session, name: str) -> None:
    acted = name in my.active
    Session.delete(my, name)
    if acted and not my.active:
        my.active = list(my.known)[:1]


def _merge_all(my: Session) -> None:
    my.active = list(my.known)
    Session.merge(my)


def _merge_first(my: Session) -> None:
    if my.active and my.active[0] not in my.added:
        my.put_in(my.active[0])
    my.active = my.active[:1]


def _merged_alone(my: Session) -> Any:
    """While something is merged no other adapter acts."""
    return my.base() if my.off else my.W if my.added else Session.acting(my)


def _off_but_merged(my: Session) -> Any:
    return my.W if my.off else Session.acting(my)


def _off_by_unmerging(my: Session) -> None:
    my.unmerge()


def _merged_twice(my: Session) -> Any:
    """The branch acts beside the merged weight."""
    if my.off:
        return my.base()
    return sum((my.delta(name) for name in my.active), start=my.W)


def _eval_merges(my: Session) -> None:
    Session.eval(my)
    my.merge()


def _train_forgets(my: Session) -> None:
    my.training = True
    my.added = {}


def _eval_adds(my: Session) -> None:
    if my.training:
        for name in my.active:
            my.W = my.W + my.delta(name)
    my.training = False


def _unmerge_first(my: Session) -> None:
    for name in list(my.added)[:1]:
        my.take_out(name)
    my.added = {}


LIFECYCLE = (
    *family(
        "LIFECYCLE",
        "lifecycle.add",
        ("added-active", "a new adapter acts at once, beside the others", _but(add=_add_active)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.several",
        ("activate-adds", "activating leaves the others active", _but(activate=_activate_more)),
        ("activate-one", "only the first of several acts", _but(activate=_activate_one)),
        ("activate-none", "activating none leaves all as it was", _but(activate=_activate_some)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.disable",
        ("disable-nothing", "disabling does nothing", _but(disable=lambda my: None)),
        (
            "disable-merged",
            "disabling leaves what is merged",
            _but(acting=_off_but_merged),
        ),
        ("disable-for-ever", "activating does not end it", _but(activate=_activate_still_off)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.scale",
        ("scale-piled", "each factor on the last one", _but(scale=_scale_piled)),
        ("scale-nothing", "a factor is ignored", _but(scale=lambda my, name, factor: None)),
        ("scale-of-all", "a factor for all adapters", _but(scale=_scale_of_all)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.merge-twice",
        ("merge-twice", "merging twice adds twice", _but(merge=_merge_again)),
        ("unmerge-twice", "unmerging twice takes away twice", _but(unmerge=_unmerge_again)),
        (
            "merged-and-branch",
            "the branch acts beside the merged weight",
            _but(acting=_merged_twice),
        ),
        (
            "unmerge-nothing",
            "unmerging does nothing",
            _but(take_out=lambda my, name: my.added.pop(name)),
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.merge-several",
        ("merge-all", "inactive adapters are merged too", _but(merge=_merge_all)),
        ("merge-first", "only the first active one is merged", _but(merge=_merge_first)),
        ("unmerge-first", "only the first merged one is unmerged", _but(unmerge=_unmerge_first)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.scale-while-merged",
        (
            "scale-late",
            "a scale set while merged acts after unmerging only",
            _but(scale=_scale_alone),
        ),
        (
            "unmerge-anew",
            "unmerging takes away what the adapter is by then",
            _but(take_out=_unmerge_anew, scale=_scale_alone),
            "peft 0.21",
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.delete",
        ("delete-all-rest", "deleting one silences the others", _but(delete=_delete_all_rest)),
        ("delete-branch", "a deleted active adapter goes on", _but(delete=_delete_leaves_branch)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.delete-while-merged",
        (
            "delete-merged",
            "a deleted merged adapter stays in the weight",
            _but(delete=_delete_leaves_merged),
        ),
        ("delete-next", "the next adapter acts in its stead", _but(delete=_delete_next)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.activate-while-merged",
        (
            "activate-merged",
            "what is merged goes on beside what is activated",
            _but(activate=_activate_over_merged),
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.add-while-merged",
        (
            "add-merged",
            "an adapter added beside a merged one is merged",
            _but(add=_add_into_merged),
        ),
        ("add-forgets", "adding forgets what is merged", _but(add=_add_forgets_merged)),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.train-eval",
        ("eval-adds", "each evaluation merges once more", _but(eval=_eval_adds)),
        (
            "train-forgets",
            "training forgets what is merged",
            _but(train=_train_forgets),
            "microsoft/LoRA 34",
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.weight",
        (
            "weight-original",
            "the original weight while merged",
            _but(weight=lambda my: my.read(my.base())),
        ),
        ("weight-merged", "W' always", _but(weight=lambda my: my.read(my.acting()))),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.machine",
        (
            "merged-alone",
            "beside a merged adapter no other acts",
            _but(acting=_merged_alone),
            "peft 3756",
        ),
        (
            "disable-unmerges",
            "disabling unmerges and does no more",
            _but(disable=_off_by_unmerging),
        ),
    ),
)


def _of_kind(kind: str, **methods: Any) -> Callable[[], Plain]:
    """`Plain` whose session has other methods for one kind of layer."""

    def only(name: str, wrong: Callable[..., Any]) -> Any:
        right = getattr(Session, name)
        return lambda my, *given: (wrong if my.kind == kind else right)(my, *given)

    return _but(**{name: only(name, wrong) for name, wrong in methods.items()})


LIFECYCLE += (
    *family(
        "LIFECYCLE",
        "lifecycle.machine.conv1d",
        (
            "conv1d-twice",
            "2 s B A where the weight is stored (in, out)",
            _of_kind("conv1d", delta=lambda my, name: 2 * Session.delta(my, name)),
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.weight.conv1d",
        (
            "conv1d-unmerge-nothing",
            "unmerging does nothing where the weight is stored (in, out)",
            _of_kind("conv1d", take_out=lambda my, name: my.added.pop(name)),
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.machine.embedding",
        (
            "embedding-disable",
            "an embedding's adapter is not disabled",
            _of_kind("embedding", disable=lambda my: None),
        ),
        (
            "embedding-merged-twice",
            "an embedding's branch acts beside its merged table",
            _of_kind("embedding", acting=_merged_twice),
        ),
    ),
    *family(
        "LIFECYCLE",
        "lifecycle.weight.embedding",
        (
            "embedding-never-merged",
            "an embedding's table is never merged",
            _of_kind("embedding", weight=lambda my: my.read(my.base())),
        ),
    ),
)

SAME = equivalents(
    "lifecycle",
    ("in-place", "a weight changed in place", _sessions(Session)),
    ("planned", "formed from the original weight each time", _sessions(Planned)),
    ("refusing", "with errors instead of no effect", _sessions(Refusing)),
    ("eval-merges", "evaluation merges", _but(eval=_eval_merges)),
)

MISREADINGS: tuple[Misreading, ...] = LIFECYCLE + SAME
