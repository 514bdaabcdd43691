"""Schedule-Free methods under Lightning's Trainer: a callback that switches between y and x.

For those who train with lightning or pytorch_lightning; ``import prodigy`` does not load it.
"""

import importlib.util
import sys


def _callback_classes():
    """Callback of what the program has imported: lightning, pytorch_lightning, or both."""
    names = ("lightning.pytorch", "pytorch_lightning")
    imported = [name for name in names if sys.modules.get(name)]
    installed = [name for name in names if importlib.util.find_spec(name.split(".")[0])]
    if not imported and not installed:
        raise ImportError("prodigy.lightning needs lightning: pip install lightning")
    return [importlib.import_module(name).Callback for name in imported or installed[:1]]


class ScheduleFreeCallback(*_callback_classes()):
    """Lets the parameters hold y while a batch is trained on, and x when anybody looks at them.

    They hold x in validation, test and prediction, whenever the module's ``state_dict()`` is
    asked for between two batches (so in every checkpoint of ``ModelCheckpoint``, also with
    ``save_weights_only``), after ``fit`` and after an exception; y again when the next batch
    starts. A run resumed from such a checkpoint is the run that wrote it, bit for bit.

    Optimizers without train() and eval() are left alone; several optimizers and manual
    optimization are fine. Callbacks of your own that save in ``on_train_batch_end`` belong after
    this one. BatchNorm statistics stay those of y: see ``update_bn`` of the optimizer.
    """

    def __init__(self):
        super().__init__()
        self.training = False  # a batch is in progress: nobody may move the parameters
        self.hook = None

    def show_x(self, trainer, *_):
        if not self.training:
            switch(trainer, "eval")

    on_validation_start = on_test_start = on_predict_start = show_x

    def on_train_start(self, trainer, pl_module):
        self.hook = pl_module.register_state_dict_pre_hook(lambda *_: self.show_x(trainer))

    def on_train_batch_start(self, trainer, *_):
        switch(trainer, "train")
        self.training = True

    def on_train_batch_end(self, *_):
        self.training = False

    on_train_epoch_end = on_train_batch_end  # a batch that was called off has no end of its own

    def on_train_end(self, trainer, *_):
        self.training = False
        if self.hook is not None:
            self.hook.remove()
        self.show_x(trainer)

    on_exception = on_train_end


def switch(trainer, mode):
    """Call train() or eval() of every optimizer that has one."""
    for optimizer in trainer.optimizers:
        if callable(getattr(optimizer, mode, None)):
            getattr(optimizer, mode)()
