"""Three seeds as jobs on a SLURM cluster, by submitit; a job that is cut off goes on where it was.

python examples/finetune_slurm.py            (pip install "attninject[train]" submitit)

What to expect: on a machine with SLURM each seed is a job, elsewhere a process here (submitit's executor `local`). A job
that SLURM preempts or ends for time is queued again, and `resume=True` goes on from its last epoch, bit for bit.
`attninject sweep --engine slurm` writes a script for sbatch instead, without submitit.
"""

import shutil
import tempfile
from pathlib import Path

import submitit
import torch

import attninject as ai


class Run:
    """One seed; submitit pickles it, and calls it on the node."""

    def __init__(self, seed: int, out: Path) -> None:
        self.seed, self.out = seed, out

    def __call__(self) -> float:
        """Train, or go on; the best top-1."""
        import timm

        torch.manual_seed(self.seed)
        model = timm.create_model("test_resnet", num_classes=10)  # pretrained=True, or your own
        ai.inject(model, block="se", place="residual_branch")
        settings = {"epochs": 1, "batch_size": 64, "lr": 1e-2, "seed": self.seed}
        resume = (self.out / "checkpoint.safetensors").exists()
        data = {"kind": "digits", "size": 32}
        return ai.training.finetune(model, data, out=self.out, resume=resume, **settings).best["top1"]

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues when the job is cut off: the same again, which then resumes."""
        return submitit.helpers.DelayedSubmission(Run(self.seed, self.out))


if __name__ == "__main__":
    shared = Path(tempfile.mkdtemp())  # a folder that all nodes see
    executor = submitit.AutoExecutor(shared / "jobs", cluster=None if shutil.which("srun") else "local")
    executor.update_parameters(timeout_min=60, cpus_per_task=1, slurm_array_parallelism=8)
    with executor.batch():
        jobs = [executor.submit(Run(seed, shared / f"seed{seed}")) for seed in range(3)]
    for seed, job in enumerate(jobs):
        print(f"seed {seed}: top-1 {job.result():.1%}")
    shutil.rmtree(shared)
