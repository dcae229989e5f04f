"""The NAD authors' own code (github.com/bboylyg/NAD @ f17b713), imported from a checkout the user made.

It is run as it is, except for what keeps it from starting: `.cuda()` does nothing, its CIFAR-10 is replaced by the
benchmark's images, its progress bar and prints are silent, and one `.view` that current torch refuses is `.reshape`.
"""

import contextlib
import importlib
import io
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.usual import Sample
from reproduce.errors import UserError

PATCHED = {"utils.util": ("correct[:k].view(-1)", "correct[:k].reshape(-1)")}
OWN_NAMES = ("models", "utils", "data_loader", "at", "config", "main", "train_badnet")


class Pictures:
    """Stands for torchvision's CIFAR10: (PIL picture, label) by position."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.samples[i][0]), self.samples[i][1]


class Checkout:
    """Their functions on our images. Every method does exactly what their scripts do at that point."""

    def __init__(self, folder: Path, train: list[Sample], test: list[Sample], batch: int) -> None:
        if not (folder / "data_loader.py").is_file():
            raise UserError(f"{folder} holds no NAD checkout (data_loader.py is missing)")
        self.folder, self.scratch = folder.resolve(), tempfile.TemporaryDirectory()
        self.main, self.train_badnet, self.data = self._load()
        self.train, self.test = Pictures(train), Pictures(test)
        stand_in = types.SimpleNamespace(CIFAR10=lambda root, train, download: self.train if train else self.test)
        self.data.datasets, self.data.tqdm = stand_in, lambda iterable: iterable
        self.opt = self.main.get_arguments().parse_args([])
        self.opt.cuda, self.opt.device, self.opt.save = 0, "cpu", 0
        self.opt.batch_size, self.opt.log_root = batch, self.scratch.name

    def _load(self) -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
        def theirs() -> list[str]:
            return [name for name in sys.modules if name.split(".")[0] in OWN_NAMES]

        # Names as common as `utils` may be somebody else's; those get their place back.
        others = {name: sys.modules.pop(name) for name in theirs()}
        with self._running():
            sys.path.insert(0, str(self.folder))
            try:
                for name, (old, new) in PATCHED.items():
                    package, _, stem = name.rpartition(".")
                    importlib.import_module(package)
                    module = types.ModuleType(name)
                    source = (self.folder / package / f"{stem}.py").read_text(encoding="utf-8").replace(old, new)
                    exec(compile(source, f"{name} (patched)", "exec"), module.__dict__)
                    sys.modules[name] = module
                return tuple(map(importlib.import_module, ("main", "train_badnet", "data_loader")))
            finally:
                sys.path.remove(str(self.folder))
                for name in theirs():
                    del sys.modules[name]
                sys.modules.update(others)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Inside: silent, without a GPU, in their folder (they read trigger files by relative path)."""
        kept = nn.Module.cuda, torch.Tensor.cuda
        nn.Module.cuda = torch.Tensor.cuda = lambda self, *_args, **_options: self
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(self.folder):
                yield
        finally:
            nn.Module.cuda, torch.Tensor.cuda = kept

    def poison(self, trigger: str, chosen: np.ndarray | None = None) -> tuple[list[Sample], list[Sample]]:
        """(training set, triggered test set) as they make them, the clean test set too; `chosen` replaces their draw
        of the poisoned training positions."""
        self.opt.trigger_type = trigger
        drawn = np.random.permutation
        if chosen is not None:
            np.random.permutation = lambda n: chosen if n == len(self.train) else drawn(n)
        try:
            with self._running():
                train = self.data.get_backdoor_loader(self.opt).dataset.dataset
                _clean, triggered = self.data.get_test_loader(self.opt)
        finally:
            np.random.permutation = drawn
        return train, triggered.dataset.dataset

    def clean_loader(self) -> DataLoader:
        """Augmented batches of all training images."""
        self.opt.ratio = 1.0
        with self._running():
            return self.data.get_train_loader(self.opt)

    def backdoor_loader(self) -> DataLoader:
        """Batches of the poisoned training set, without augmentation."""
        with self._running():
            return self.data.get_backdoor_loader(self.opt)

    def test_loaders(self) -> tuple[DataLoader, DataLoader]:
        with self._running():
            return self.data.get_test_loader(self.opt)

    def network(self, state: dict[str, torch.Tensor]) -> nn.Module:
        with self._running():
            model = self.main.select_model("CIFAR10", "WRN-16-1")
        model.load_state_dict(state)
        return model

    def train_victim(self, model: nn.Module, loader: DataLoader, optimiser: torch.optim.Optimizer) -> None:
        """One epoch of train_badnet.py."""
        with self._running():
            self.train_badnet.train_step(self.opt, loader, {"snet": model}, optimiser,
                                         {"criterionCls": nn.CrossEntropyLoss()}, 1)

    def _pair(self, student: nn.Module, teacher: nn.Module) -> tuple[dict, dict]:
        return ({"snet": student, "tnet": teacher.eval()},
                {"criterionCls": nn.CrossEntropyLoss(), "criterionAT": self.main.AT(self.opt.p)})

    def erase(self, student: nn.Module, teacher: nn.Module, loader: DataLoader,
              optimiser: torch.optim.Optimizer) -> None:
        """One epoch of main.py's distillation."""
        nets, criterions = self._pair(student, teacher)
        with self._running():
            self.main.train_step(self.opt, loader, nets, optimiser, criterions, 1)

    def evaluate(self, student: nn.Module, teacher: nn.Module, clean: DataLoader, triggered: DataLoader) -> None:
        """main.py's test()."""
        nets, criterions = self._pair(student, teacher)
        with self._running():
            self.main.test(self.opt, clean, triggered, nets, criterions, 1)

    def run(self, state: dict[str, torch.Tensor], epochs: int) -> None:
        """main.py from loading both networks to the last evaluation; the training images are the clean subset."""
        path = f"{self.scratch.name}/model.tar"
        torch.save({"state_dict": state, "epoch": 0}, path)
        self.opt.s_model = self.opt.t_model = path
        self.opt.ratio, self.opt.epochs = 1.0, epochs
        with self._running():
            self.main.train(self.opt)
