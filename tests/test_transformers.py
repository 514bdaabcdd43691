"""Under Transformers' Trainer: the plain loop's numbers, modes by themselves, exact resume."""

import gc
import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers
from framework import METHODS, assert_apart, assert_equal, average, every_free_method
from framework import every_method, values
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STEPS = 8
ROWS = 16
TOKENS = 11

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every training ends with a full collection: let it pass over all that is loaded by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def language_model(seed=0):
    """A GPT-2 of one layer, four channels and no dropout; its two embeddings are one tensor."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=TOKENS, n_positions=5, n_embd=4, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS, (ROWS, 5), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class Record(transformers.TrainerCallback):
    """Writes down the parameters after every step, the average beside them, and what is seen.

    The last of the callbacks: what it sees is what the trainer saves, evaluates or leaves.
    """

    def __init__(self):
        self.y, self.x, self.saved, self.seen = {}, {}, {}, {}

    def on_optimizer_step(self, args, state, control, model, optimizer, **_):
        self.y[state.global_step + 1] = values(model)
        optimizer = optimizer.optimizer
        if hasattr(optimizer, "averaged"):
            self.x[state.global_step + 1] = average(model, optimizer)

    def on_prediction_step(self, args, state, control, model, **_):
        self.seen[state.global_step] = values(model)

    def on_save(self, args, state, control, model, **_):
        self.saved[state.global_step] = values(model)


def trainer(folder, model, *callbacks, how=Trainer, **options):
    names = ("optimizers", "optimizer_cls_and_kwargs")
    ours = {name: options.pop(name) for name in names if name in options}
    options = {"max_steps": STEPS, "save_strategy": "no", **options}
    settings = TrainingArguments(
        folder, use_cpu=True, report_to="none", disable_tqdm=True, max_grad_norm=1.0,
        per_device_train_batch_size=2, per_device_eval_batch_size=ROWS, logging_strategy="no",
        dataloader_pin_memory=False, **options)
    return how(model, settings, train_dataset=rows(), eval_dataset=rows(1),
               callbacks=list(callbacks), **ours)


class Keeps(Trainer):
    """A trainer that keeps what its model was called with in training, in order."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches = [*getattr(self, "batches", []), (inputs, num_items_in_batch)]
        return super().training_step(model, inputs, num_items_in_batch)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def grouped(trainer, model):
    """The trainer's own two groups: with weight decay, and biases and norms without it."""
    decay = trainer.get_decay_parameter_names(model)
    named = list(model.named_parameters())
    return [{"params": [p for n, p in named if n in decay], "weight_decay": 0.1},
            {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0}]


CLASSES = [case for case in METHODS if isinstance(case.cls, type)]
PAIRS = [(case, "caller") for case in METHODS] + [(case, "trainer") for case in CLASSES]


@pytest.mark.parametrize("case, who", PAIRS, ids=str)
def test_training_under_the_trainer_is_the_plain_loop(case, who, tmp_path):
    """The optimizer built by the caller, with a schedule, or by the trainer, in two groups."""
    model = language_model()
    if who == "caller":
        optimizer = case.cls(model.parameters(), **case.kwargs)
        fit = trainer(tmp_path, model, how=Keeps, optimizers=(optimizer, halving(optimizer)))
    else:
        fit = trainer(tmp_path, model, how=Keeps, weight_decay=0.1, lr_scheduler_type="linear",
                      optimizer_cls_and_kwargs=(case.cls, dict(case.kwargs)))
    fit.train()
    assert len(fit.batches) == STEPS

    plain = language_model()
    if who == "caller":
        optimizer = case.cls(plain.parameters(), **case.kwargs)
        scheduler = halving(optimizer)
    else:
        optimizer = case.cls(grouped(fit, plain), **case.kwargs)
        decays = [group["weight_decay"] for group in fit.optimizer.param_groups]
        assert decays == [0.1, 0.0] == [group["weight_decay"] for group in optimizer.param_groups]
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    for batch, count in fit.batches:
        plain(**batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_equal(values(model), values(plain))
    assert_apart(values(plain), values(language_model()))


@every_free_method
def test_whoever_evaluates_sees_x(case, tmp_path):
    model, record = language_model(), Record()
    optimizer = case.cls(model.parameters(), **case.kwargs)
    fit = trainer(tmp_path, model, record, optimizers=(optimizer, halving(optimizer)),
                  eval_strategy="steps", eval_steps=3)
    fit.train()
    assert list(record.seen) == [3, 6, STEPS]
    for step, seen in record.seen.items():
        assert_equal(seen, record.x[step])
        assert_apart(seen, record.y[step])


@every_method
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_resumed_run_is_the_same_run(case, evaluates, tmp_path):
    """From the file of step 3, written while the parameters hold y, or x after an evaluation."""
    runs = []
    for seed, source in ((0, None), (1, tmp_path / "checkpoint-3")):
        model, record = language_model(seed), Record()
        optimizer = case.cls(model.parameters(), **case.kwargs)
        fit = trainer(tmp_path, model, record, optimizers=(optimizer, halving(optimizer)),
                      save_strategy="steps", save_steps=3, eval_steps=3,
                      eval_strategy="steps" if evaluates else "no")
        fit.train(resume_from_checkpoint=source)
        runs.append((model, record))
    (model, record), (fresh, again) = runs
    if case.schedule_free:
        assert_equal(record.saved[3], (record.x if evaluates else record.y)[3])
    assert min(again.y) == 4
    for step in again.y:
        assert_equal(again.y[step], record.y[step])
    assert_equal(values(fresh), values(model))


def save_x():
    """The callback that README.md gives to users."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
               if "class SaveX" in code]
    names = {}
    exec(code, names)
    return names["SaveX"]()


@every_free_method
@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_files_hold_x_with_the_callback_of_the_readme(case, strategy, tmp_path):
    model, record = language_model(), Record()
    optimizer = case.cls(model.parameters(), **case.kwargs)
    fit = trainer(tmp_path, model, save_x(), record, save_strategy=strategy, save_steps=3,
                  optimizers=(optimizer, halving(optimizer)))
    fit.train()
    assert list(record.saved) == {"steps": [3, 6, STEPS], "epoch": [STEPS], "no": []}[strategy]
    for step in record.saved:
        assert_equal(record.saved[step], record.x[step])
        file = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert_equal(file, {name: record.x[step][name] for name in file})
    assert_equal(values(model), record.x[STEPS])


@every_free_method
def test_the_best_model_is_not_moved_once_it_is_loaded(case, tmp_path):
    """It is the first here, while the optimizer's own tensors are those of the last step."""
    model, record = language_model(), Record()
    optimizer = case.cls(model.parameters(), **case.kwargs)
    fit = trainer(tmp_path, model, record, save_strategy="steps", save_steps=3,
                  eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
                  metric_for_best_model="order", greater_is_better=False,
                  optimizers=(optimizer, halving(optimizer)))
    order = itertools.count()
    fit.compute_metrics = lambda _: {"order": next(order)}
    fit.train()
    best = fit.state.best_global_step
    assert best == 3
    assert_equal(values(model), record.x[best])
    fit.evaluate()
    assert_equal(values(model), record.x[best])
