"""Under Accelerate: prepare changes no number, modes are forwarded, checkpoints resume exactly."""

import pytest
import torch
import zoo
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from framework import assert_apart, assert_equal, average, every_free_method, every_method, values

BATCHES = 8


@pytest.fixture(autouse=True)
def alone():
    """Accelerate keeps its settings in singletons: every test starts without them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))


def loader():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * BATCHES, 3, generator=generator)
    y = torch.randn(2 * BATCHES, 1, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=2)


def parts(case, seed=0):
    """A network, its optimizer in two groups, and a schedule that halves lr every two steps."""
    net = network(seed)
    groups = [{"params": net[0].parameters()}, {"params": net[3].parameters()}]
    optimizer = zoo.make(case, groups)
    return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def loss_of(net, batch):
    X, y = batch
    return (net(X) - y).square().mean()


def train(accelerator, net, optimizer, scheduler, batches):
    for batch in batches:
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@every_method
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_under_accelerate_is_the_plain_loop(case, precision, accumulate):
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    net, optimizer, scheduler, batches = accelerator.prepare(*parts(case), loader())
    set_seed(0)
    train(accelerator, net, optimizer, scheduler, batches)

    plain, optimizer, scheduler = parts(case)
    set_seed(0)
    for index, batch in enumerate(loader()):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(plain, batch)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert_equal(values(accelerator.unwrap_model(net)), values(plain))
    assert_apart(values(plain), values(network()))


@every_method
def test_modes_are_forwarded(case):
    accelerator = Accelerator(cpu=True)
    net, optimizer, scheduler, batches = accelerator.prepare(*parts(case), loader())
    optimizer.train()
    train(accelerator, net, optimizer, scheduler, batches)
    y = values(net)
    x = average(net, optimizer.optimizer) if case.schedule_free else y
    optimizer.eval()
    assert_equal(values(net), x)
    if case.schedule_free:
        assert_apart(x, y)
        with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
            optimizer.step()
    optimizer.train()
    for name, p in values(net).items():
        torch.testing.assert_close(p, y[name])
    optimizer.step()


@every_method
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_resumed_run_is_the_same_run(case, mode, safe, tmp_path):
    """save_state after half an epoch, load_state into fresh objects, and the other half."""
    accelerator = Accelerator(cpu=True)
    net, optimizer, scheduler, batches = accelerator.prepare(*parts(case), loader())
    batches = list(batches)
    train(accelerator, net, optimizer, scheduler, batches[:5])
    getattr(optimizer, mode)()
    saved = values(net)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    optimizer.train()
    train(accelerator, net, optimizer, scheduler, batches[5:])

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    fresh, again, schedule, _ = accelerator.prepare(*parts(case, seed=1), loader())
    accelerator.load_state(tmp_path)
    assert_equal(values(fresh), saved)
    assert schedule.get_last_lr() != scheduler.get_last_lr()
    again.train()
    train(accelerator, fresh, again, schedule, batches[5:])
    assert_equal(values(fresh), values(net))
    assert schedule.get_last_lr() == scheduler.get_last_lr()


@every_free_method
def test_a_checkpoint_in_eval_mode_holds_x(case, tmp_path):
    accelerator = Accelerator(cpu=True)
    net, optimizer, scheduler, batches = accelerator.prepare(*parts(case), loader())
    train(accelerator, net, optimizer, scheduler, batches)
    x = average(net, optimizer.optimizer)
    optimizer.eval()
    accelerator.save_model(net, tmp_path, safe_serialization=False)
    assert_equal(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), x)
