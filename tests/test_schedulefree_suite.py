"""What schedulefree 1.4.1's own tests assert, asserted of our classes.

Its file schedulefree/test_schedulefree.py compares its versions with one another on random float32
gradients on a GPU, x and z after every step. Here our classes stand in the place of one side and
the package's reference, closure and wrapper classes on the other, in float64 on the CPU.
"""

import pytest
import schedulefree
import torch

import prodigy

DECAY = dict(lr=0.3, weight_decay=0.5)
WARM = dict(DECAY, warmup_steps=5)
store = pytest.mark.parametrize("store_x", [False, True], ids=["", "store_x"])


def weights(number, shape=(3, 2)):
    """The same random parameter several times."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [start.clone().requires_grad_() for _ in range(number)]


def gradients(steps, shape=(3, 2)):
    generator = torch.Generator().manual_seed(2)
    return torch.rand((steps, *shape), generator=generator, dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def z_of(optimizer, p):
    return optimizer.state[p]["z"]


def check_agree(ours, p, theirs, q, steps):
    """y in train mode, x in eval mode and z agree while both switch back and forth."""
    for g in gradients(steps):
        ours.train()
        theirs.train()
        same(p, q)
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
        same(p, q)
        same(z_of(ours, p), z_of(theirs, q))
        ours.eval()
        theirs.eval()
        same(p, q)


def check_closure_form(ours, p, theirs, q, steps):
    """Ours in train/eval form against a closure class: it holds x and shows y in the closure."""
    for g in gradients(steps):

        def closure(g=g):
            same(q, p)  # both at y
            q.grad = g.clone()

        ours.train()
        theirs.step(closure=closure)
        p.grad = g.clone()
        ours.step()
        same(p, q.lerp(z_of(theirs, q), 0.1))
        ours.eval()
        same(p, q)
        same(z_of(ours, p), z_of(theirs, q))


# wrapper ---------------------------------------------------------------------------------------


@store
@pytest.mark.parametrize("ours", [False, True], ids=["torch.SGD", "prodigy.SGD"])
def test_wrapper_over_sgd_is_sgd_schedule_free(store_x, ours):
    sgd = prodigy.SGD if ours else torch.optim.SGD
    p, q = weights(2)
    wrapped = prodigy.ScheduleFreeWrapper(
        sgd([p], lr=0.3), momentum=0.9, weight_decay_at_y=0.5, store_x=store_x
    )
    check_agree(wrapped, p, schedulefree.SGDScheduleFree([q], momentum=0.9, **DECAY), q, 100)


@pytest.mark.parametrize("form", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_schedule_free_is_their_wrapper_over_sgd(form, momentum):
    p, q = weights(2)
    wrap, sgd = getattr(schedulefree, form), torch.optim.SGD
    theirs = wrap(sgd([q], lr=0.3, momentum=momentum), momentum=0.9, weight_decay_at_y=0.1)
    if momentum:
        ours = prodigy.ScheduleFreeWrapper(
            sgd([p], lr=0.3, momentum=momentum), momentum=0.9, weight_decay_at_y=0.1
        )
    else:
        ours = prodigy.SGDScheduleFree([p], lr=0.3, weight_decay=0.1, momentum=0.9)
    check_agree(ours, p, theirs, q, 100)


# references and closures -----------------------------------------------------------------------

REFERENCES = [
    ("SGDScheduleFree", "SGDScheduleFreeReference", WARM),
    ("SGDScheduleFree", "SGDScheduleFree", WARM),
    ("AdamWScheduleFree", "AdamWScheduleFreeReference", WARM),
    ("AdamWScheduleFree", "AdamWScheduleFree", WARM),
    ("RAdamScheduleFree", "RAdamScheduleFree", DECAY),
]
CLOSURES = [
    ("SGDScheduleFree", "SGDScheduleFreeClosure", WARM),
    ("AdamWScheduleFree", "AdamWScheduleFreeClosure", WARM),
    ("RAdamScheduleFree", "RAdamScheduleFreeClosure", DECAY),
]


@store
@pytest.mark.parametrize(("name", "reference", "options"), REFERENCES)
def test_agrees_with_the_reference_form(name, reference, options, store_x):
    p, q = weights(2)
    ours = getattr(prodigy, name)([p], store_x=store_x, **options)
    check_agree(ours, p, getattr(schedulefree, reference)([q], **options), q, 20)


@store
@pytest.mark.parametrize(("name", "reference", "options"), CLOSURES)
def test_agrees_with_the_closure_class(name, reference, options, store_x):
    p, q = weights(2)
    ours = getattr(prodigy, name)([p], store_x=store_x, **options)
    check_closure_form(ours, p, getattr(schedulefree, reference)([q], **options), q, 20)


@store
@pytest.mark.parametrize(("name", "reference", "options"), CLOSURES)
def test_our_closure_form_is_their_closure_class(name, reference, options, store_x):
    """The same training loop: step(closure), no train() and eval(); y only within the closure."""
    p, q = weights(2)
    optimizers = (
        getattr(prodigy, name)([p], store_x=store_x, closure_form=True, **options),
        getattr(schedulefree, reference)([q], **options),
    )
    for g in gradients(20):
        seen = []
        for optimizer, w in zip(optimizers, (p, q)):

            def closure(w=w, g=g):
                seen.append(w.detach().clone())
                w.grad = g.clone()
                return w.sum()

            loss = optimizer.step(closure=closure)
            same(loss, seen[-1].sum())
        same(seen[0], seen[1])
        same(p, q)
        same(z_of(optimizers[0], p), z_of(optimizers[1], q))


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_our_closure_form_is_our_normal_form(name):
    options = DECAY if name == "RAdamScheduleFree" else WARM
    p, q = weights(2)
    normal = getattr(prodigy, name)([p], **options)
    closing = getattr(prodigy, name)([q], closure_form=True, **options)
    for g in gradients(20):
        p.grad = g.clone()
        normal.step()
        closing.step(lambda g=g: setattr(q, "grad", g.clone()))
        with normal.averaged():
            same(p, q)


# foreach ---------------------------------------------------------------------------------------


@store
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_foreach_with_an_empty_group_and_a_group_without_gradients(name, store_x):
    options = dict(DECAY if name == "RAdamScheduleFree" else WARM, store_x=store_x)
    (p, q), (p2, q2), (idle, idle2) = weights(2), weights(2, (1, 1)), weights(2, (1, 2))
    before = idle.detach().clone()

    def build(first, second, third, foreach):
        groups = [{"params": [first, second]}, {"params": []}, {"params": [third]}]
        return getattr(prodigy, name)(groups, foreach=foreach, **options)

    foreach, loop = build(p, p2, idle, True), build(q, q2, idle2, False)
    for g, g2 in zip(gradients(10), gradients(10, (1, 1))):
        for optimizer, pair in ((foreach, (p, p2)), (loop, (q, q2))):
            optimizer.train()
            for w, grad in zip(pair, (g, g2)):
                w.grad = grad.clone()
            optimizer.step()
            optimizer.eval()
        same(p, q)
        same(p2, q2)
        same(z_of(foreach, p), z_of(loop, q))
        assert torch.equal(idle, before)
        assert torch.equal(idle2, before)
    theirs_p, theirs_p2 = weights(1)[0], weights(1, (1, 1))[0]
    theirs = getattr(schedulefree, name)(
        [theirs_p, theirs_p2], **(DECAY if name == "RAdamScheduleFree" else WARM)
    )
    theirs.train()
    for g, g2 in zip(gradients(10), gradients(10, (1, 1))):
        theirs_p.grad, theirs_p2.grad = g.clone(), g2.clone()
        theirs.step()
    theirs.eval()
    same(p, theirs_p)
    same(p2, theirs_p2)


# compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree"])
def test_compiled(name):
    p, q = weights(2)
    torch._dynamo.reset()
    compiled = getattr(prodigy, name)([p], compile=True, **WARM)
    theirs = getattr(schedulefree, name)([q], **WARM)
    check_agree(compiled, p, theirs, q, 10)


# the algebra of the two-tensor form ------------------------------------------------------------


def test_moving_y_is_moving_x_and_switching():
    """One lerp of y towards z by c is: y -> x, x towards z by c, x -> y; and so with z's step."""
    y, z, u = weights(3)[0].detach(), *gradients(2)
    beta, c, lr = 0.9, 0.05, 0.3
    x = y.lerp(z, 1 - 1 / beta)
    new_x = x.lerp(z, c)
    same(new_x.lerp(z, 1 - beta), y.lerp(z, c))
    z_new = z - lr * u
    same(x.lerp(z_new, c).lerp(z_new, 1 - beta), y.lerp(z, c) - lr * (1 - beta * (1 - c)) * u)
    same(new_x.lerp(z, 1 - beta * (1 - c)), new_x.lerp(z, c).lerp(z, 1 - beta))
