"""TRL's trainers with the terms in their loss. Importing this needs trl (1.16 or newer) and transformers.

    from torchtitan_ext.adapters.trl import RegularizedSFTTrainer
    arguments = SFTConfig(..., router_aux_loss_coef=0.0)
    RegularizedSFTTrainer(model, arguments, train_dataset=rows, regularizers={"sp": 2e-4, "cp": 1e-4})

`router_aux_loss_coef=0.0` turns off the load-balancing loss of Transformers, which most MoE models have on; ours is lb.
"""

from trl.trainer.sft_trainer import SFTTrainer

from torchtitan_ext.adapters.trainer import Regularized


class RegularizedSFTTrainer(Regularized, SFTTrainer):
    """`SFTTrainer` with one more argument, `regularizers`. Its logs have `ce`, the terms and the measures."""

    bare_name = "ce"
