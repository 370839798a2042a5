"""Tasks during training, every `eval.every` steps, on the model as it is spread over the ranks."""

import logging
from collections.abc import Callable
from pathlib import Path

from titan_moe.analysis.evaluate.evaluation import TaskSet
from titan_moe.analysis.evaluate.packaged import WORD, data_folder
from titan_moe.analysis.evaluate.scores import Batches
from titan_moe.analysis.evaluate.tasks import named_tasks
from titan_moe.config.degrees import micro_batch_size
from titan_moe.config.tables import Config
from titan_moe.data.prepare import cache_root
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.generate.load import Loaded
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.compilation import compiles
from titan_moe.parallel.mesh import Mesh, from_first

log = logging.getLogger("titan_moe")


class TaskEvaluation:
    """What the trainer calls: `evaluation(model, step, progress)` gives the row's numbers, on rank 0."""

    def __init__(self, config: Config, tokenizer: Tokenizer, mesh: Mesh) -> None:
        """Loads the tasks; a collective. Raises UserError for what is no task, or has no data."""
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        chosen = Path(config.eval.data or WORD)
        data = from_first(lambda: data_folder(chosen, cache_root(config), "eval.data"))
        self.tasks = TaskSet(named_tasks(config.eval.tasks, "eval.tasks"), data, mesh)
        if self.tasks.missing.keys() - self.tasks.found:
            raise UserError(f"eval.tasks: {'. '.join(self.tasks.missing.values())}")

    def __call__(self, model: Transformer, step: int, progress: Callable[[], None]) -> dict[str, float]:
        """The measures by name, eval/TASK/MEASURE; empty except on rank 0. A collective that changes nothing of a run.

        A compiled model gets batches of the shape that it is trained with, so that it is not compiled again."""
        config, mesh = self.config, self.mesh
        size, full = micro_batch_size(config, mesh.degrees), compiles(config.compile, mesh.device)
        batches = Batches(size, config.training.seq_len, mesh, full, progress)
        rows, _ = self.tasks.run(Loaded(model, self.tokenizer, config, step, mesh), batches, config.eval.limit)
        if self.tasks.cut and mesh.first:
            log.info(f"{self.tasks.cut} texts of the tasks were cut from the left to {batches.length} tokens")
        return {f"eval/{row['task']}/{row['measure']}": row["value"] for row in rows}
