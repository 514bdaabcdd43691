"""Under Lightning's Trainer: it evaluates and saves x, and a resumed run is the same run."""

import copy
import importlib.util
import sys
import warnings

import lightning.pytorch as pl
import pytest
import torch
import zoo
from framework import FREE, assert_apart, assert_equal, average, every_free_method, every_method
from framework import values
from lightning.pytorch.callbacks import ModelCheckpoint

import prodigy.lightning
from prodigy import Prodigy, SGDScheduleFree
from prodigy.lightning import ScheduleFreeCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{words}")
    for words in ("does not have many workers", "isinstance.treespec", "predict returned None",
                  "Checkpoint directory", "dirpath has changed", "callbacks used to create",
                  "You defined a `validation_step`")
]
BATCHES = 4
PHASES = {"validate": "validation", "test": "test", "predict": "predict"}


def loader(seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * BATCHES, 3, generator=generator)
    y = torch.randn(2 * BATCHES, 1, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=2)


class Module(pl.LightningModule):
    """A small regression whose steps write down what the parameters are.

    y, x: after every training step, what they are and what the optimizer's average is.
    seen: (phase, number of steps done, parameters) of every evaluation batch.
    """

    def __init__(self, case, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.case = case
        self.y, self.x, self.seen = {}, {}, []

    def configure_optimizers(self):
        return zoo.make(self.case, self.net.parameters())

    def training_step(self, batch, index):
        X, y = batch
        return (self.net(X) - y).square().mean()

    def on_train_batch_end(self, *_):
        optimizer = self.optimizers().optimizer
        self.y[self.global_step] = values(self)
        if self.case.schedule_free:
            self.x[self.global_step] = average(self, optimizer)

    def look(self, phase):
        self.seen.append((phase, self.trainer.global_step, values(self)))

    def validation_step(self, batch, index):
        self.look("validation")

    def test_step(self, batch, index):
        self.look("test")

    def predict_step(self, batch, index):
        self.look("predict")


def trainer(folder, *callbacks, package=pl, **options):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    return package.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options)


def by_hand(case, breaks=(), steps=2 * BATCHES):
    """The same run as a plain loop, with an eval() and train() after the named steps."""
    module = Module(case)
    optimizer = module.configure_optimizers()
    batches = list(loader())
    for step in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = module.training_step(batches[step % BATCHES], step)
            loss.backward()
            return loss

        optimizer.step(closure)
        if step + 1 in breaks and case.schedule_free:
            optimizer.eval()
            optimizer.train()
    return module, optimizer


@every_method
def test_training_under_the_trainer_is_the_plain_loop(case, tmp_path):
    """Validation after every second batch, with one more switch at the end of the run."""
    module = Module(case)
    trainer(tmp_path, ScheduleFreeCallback(), val_check_interval=2).fit(
        module, loader(), loader(1))
    plain, optimizer = by_hand(case, breaks=(2, 4, 6))
    assert_equal(module.y[2 * BATCHES], values(plain))
    if case.schedule_free:
        optimizer.eval()
    assert_equal(values(module), values(plain))


@every_free_method
def test_whoever_evaluates_sees_x(case, tmp_path):
    module = Module(case)
    fit = trainer(tmp_path, ScheduleFreeCallback(), val_check_interval=2, num_sanity_val_steps=1)
    fit.fit(module, loader(), loader(1))
    sanity, *seen = module.seen
    assert [step for _, step, _ in seen] == sorted([2, 4, 6, 8] * BATCHES)
    for _, step, parameters in seen:
        assert_equal(parameters, module.x[step])
        assert_apart(parameters, module.y[step])


@every_free_method
@pytest.mark.parametrize("phase", ["validate", "test", "predict"])
def test_what_comes_after_the_fit_sees_x(case, phase, tmp_path):
    """Even if somebody has switched back to y in between."""
    module = Module(case)
    fit = trainer(tmp_path, ScheduleFreeCallback())
    fit.fit(module, loader())
    assert_equal(values(module), module.x[2 * BATCHES])
    getattr(fit, phase)(module, loader(1))
    assert_equal(module.seen[-1][2], module.x[2 * BATCHES])
    fit.optimizers[0].train()
    assert_apart(values(module), module.x[2 * BATCHES])
    getattr(fit, phase)(module, loader(1))
    assert [name for name, _, _ in module.seen[BATCHES:]] == [PHASES[phase]] * BATCHES
    for name, p in module.seen[-1][2].items():
        torch.testing.assert_close(p, module.x[2 * BATCHES][name], rtol=1e-6, atol=1e-7)


@every_free_method
@pytest.mark.parametrize("weights_only", [False, True])
def test_model_checkpoint_saves_x_at_any_step(case, weights_only, tmp_path):
    module = Module(case)
    saver = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True,
        save_weights_only=weights_only)
    trainer(tmp_path, ScheduleFreeCallback(), saver).fit(module, loader())
    files = {3: "step=3.ckpt", 6: "step=6.ckpt"}
    for step, name in files.items():
        saved = torch.load(tmp_path / name, weights_only=True)
        assert_equal(saved["state_dict"], module.x[step])
        assert ("optimizer_states" in saved) != weights_only


def test_an_epoch_that_is_called_off_ends_at_x(tmp_path):
    """on_train_batch_start may return -1: Lightning then leaves out the batch's end."""
    module = Module(FREE[0])
    module.on_train_batch_start = lambda _, index: -1 if index == 2 else None
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True)
    trainer(tmp_path, ScheduleFreeCallback(), saver).fit(module, loader())
    for epoch, step in ((0, 2), (1, 4)):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert_equal(saved["state_dict"], module.x[step])


SAVERS = {
    "after a batch": dict(every_n_train_steps=BATCHES),
    "after an epoch": dict(every_n_epochs=1, save_on_train_epoch_end=True),
    "after validation": dict(every_n_epochs=1, save_on_train_epoch_end=False),
}


@every_method
@pytest.mark.parametrize("saver", SAVERS)
def test_a_resumed_run_is_the_same_run(case, saver, tmp_path):
    """Two epochs, and the second of them once more by a fresh module from the first's file."""
    module = Module(case)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, **SAVERS[saver])
    trainer(tmp_path, ScheduleFreeCallback(), save).fit(module, loader(), loader(1))
    fresh = Module(case, seed=1)
    save = ModelCheckpoint(tmp_path / "more", "{epoch}", save_top_k=-1, **SAVERS[saver])
    trainer(tmp_path, ScheduleFreeCallback(), save).fit(
        fresh, loader(), loader(1), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert set(fresh.y) == {BATCHES + 1, BATCHES + 2, BATCHES + 3, BATCHES + 4}
    for step in fresh.y:
        assert_equal(fresh.y[step], module.y[step])
    assert_equal(values(fresh), values(module))


@every_free_method
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_loaded_file_is_tested_as_it_is(case, interrupted, tmp_path):
    """The trainer still holds the optimizers of the fit: they must not move what was loaded."""

    class Breaks(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if interrupted and trainer.global_step == BATCHES + 1:
                raise RuntimeError("stop")

    module = Module(case)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit = trainer(tmp_path, ScheduleFreeCallback(), Breaks(), save)
    if interrupted:
        with pytest.raises(RuntimeError, match="stop"):
            fit.fit(module, loader())
        assert_equal(values(module), module.x[BATCHES + 1])
    else:
        fit.fit(module, loader())
    fit.test(module, loader(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert fit.optimizers
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert_equal(module.seen[-1][2], saved)
    assert_equal(saved, module.x[BATCHES])


def test_weights_that_are_copied_within_a_batch_are_y(tmp_path):
    """For example by an average of weights of one's own: the step goes on undisturbed."""

    class Copies(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.copy = copy.deepcopy(pl_module.state_dict())

        def on_train_batch_end(self, trainer, pl_module, *_):
            copy.deepcopy(pl_module)

    module = Module(FREE[0])
    copies = Copies()
    fit = trainer(tmp_path, ScheduleFreeCallback(), copies)
    fit.fit(module, loader())
    assert_equal(module.y[2 * BATCHES], values(by_hand(FREE[0])[0]))
    assert_equal(copies.copy, module.y[2 * BATCHES - 1])
    hooks = module._state_dict_pre_hooks
    assert not hooks


class Two(Module):
    """Two optimizers over two layers, stepped by hand, the second every other batch."""

    automatic_optimization = False

    def configure_optimizers(self):
        free = SGDScheduleFree(self.net[0].parameters(), lr=0.1)
        return [free, Prodigy(self.net[2].parameters(), d0=1e-3)]

    def training_step(self, batch, index):
        free, prodigy = self.optimizers()
        free.zero_grad()
        prodigy.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        free.step()
        if index % 2:
            prodigy.step()

    def on_train_batch_end(self, *_):
        self.y[len(self.y)] = values(self)
        self.x[len(self.x)] = average(self, self.trainer.optimizers[0])


def test_several_optimizers_stepped_by_hand(tmp_path):
    module = Two(FREE[0])
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, ScheduleFreeCallback(), save).fit(module, loader(), loader(1))
    assert_equal(module.seen[0][2], module.x[BATCHES - 1])
    assert_equal(module.seen[-1][2], module.x[2 * BATCHES - 1])
    fresh = Two(FREE[0], seed=1)
    trainer(tmp_path, ScheduleFreeCallback()).fit(
        fresh, loader(), loader(1), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_equal(values(fresh), values(module))


@pytest.mark.parametrize("callbacks", [[], [ScheduleFreeCallback()]], ids=["without", "with"])
def test_the_closure_form_needs_no_callback(callbacks, tmp_path):
    """Lightning hands the optimizer a closure: y lives within the step alone."""
    case = zoo.Case("closure", SGDScheduleFree, {"lr": 0.1, "closure_form": True})
    module = Module(case)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True)
    trainer(tmp_path, *callbacks, save).fit(module, loader(), loader(1))

    plain, _ = by_hand(case)
    for name, p in values(plain).items():
        torch.testing.assert_close(module.y[2 * BATCHES][name], p)
    assert_equal(module.seen[-1][2], module.y[2 * BATCHES])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert_equal(saved, values(module))
    assert_equal(saved, module.y[2 * BATCHES])


# lightning under its two names ------------------------------------------------------------------


def load_anew():
    """The module prodigy.lightning once more, as if it were imported now."""
    spec = importlib.util.spec_from_file_location("anew", prodigy.lightning.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_callback_serves_pytorch_lightning_too(tmp_path):
    old = pytest.importorskip("pytorch_lightning")

    class Old(old.LightningModule):
        configure_optimizers = Module.configure_optimizers
        training_step = Module.training_step
        validation_step = Module.validation_step
        on_train_batch_end = Module.on_train_batch_end
        look = Module.look
        case = FREE[0]

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Module(FREE[0]).net
            self.y, self.x, self.seen = {}, {}, []

    module = Old()
    callback = load_anew().ScheduleFreeCallback()
    assert isinstance(callback, old.Callback) and isinstance(callback, pl.Callback)
    trainer(tmp_path, callback, package=old).fit(module, loader(), loader(1))
    assert_equal(module.seen[-1][2], module.x[2 * BATCHES])
    assert_equal(module.y[2 * BATCHES], values(by_hand(FREE[0], breaks=(BATCHES,))[0]))


def test_the_missing_package_is_named(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        load_anew()
