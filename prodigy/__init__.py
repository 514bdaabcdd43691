"""One family of optimizers: every method is a choice of three things.

| | direction: gradient to update | size: how far | point: where to differentiate, evaluate |
|---|---|---|---|
| SGD, momentum, Nesterov | g, its running average | lr | x, look-ahead |
| Adagrad, RMSprop, Adam, AdamW | m over root v, bias corrected | lr | x |
| DAdaptSGD, DAdaptAdaGrad, DAdaptAdam | as above | d, a lower bound on D | x, primal average |
| Prodigy | Adam on d g | d from <g, x0 - x> over the 1-norm of s | x |
| SGDScheduleFree, AdamWScheduleFree, RAdamScheduleFree | g, or g over root v | lr | y, z, x |
| ScheduleFreeWrapper | any base optimizer | the base's | y, z, x |
| DoG, LDoG, DoWG | g | distance from x0 over the gradients' norms | x |
| COCOB | sum of g | the reward of a bet | x |
| Mechanic | any base optimizer | its factor, learned | x |
| DAdaptResetting | sum of g | d, from x0 anew when it has doubled | x |
| ScheduleFreePolyak, ScheduleFreePlus | g, Adam | the loss over g's size | y, z, x |
| ProdigyPlusScheduleFree | d g over root v, factored, atan2, ... | Prodigy's d, SPEED | y, z, x |

Change one import and keep the training script: arguments, defaults and checkpoints are those of
torch.optim, dadaptation 3.2, prodigyopt 1.1.2 and schedulefree 1.4.1.
"""

from .classical import SGD, Adagrad, Adam, AdamW, RMSprop
from .dadaptation import DAdaptAdaGrad, DAdaptAdam, DAdaptSGD
from .plus import ProdigyPlusScheduleFree
from .prodigy import Prodigy
from .rivals import (COCOB, DAdaptResetting, DoG, DoWG, LDoG, Mechanic, ScheduleFreePlus,
                     ScheduleFreePolyak)
from .schedulefree import (AdamWScheduleFree, RAdamScheduleFree, ScheduleFreeWrapper,
                           SGDScheduleFree)

__version__ = "0.1.0"

__all__ = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "DAdaptSGD", "DAdaptAdaGrad",
           "DAdaptAdam", "Prodigy", "SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree",
           "ScheduleFreeWrapper", "ProdigyPlusScheduleFree", "DoG", "LDoG", "DoWG", "COCOB",
           "Mechanic", "ScheduleFreePolyak", "ScheduleFreePlus", "DAdaptResetting"]
