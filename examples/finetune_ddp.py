"""PyTorch DDP in a script of your own: blocks and head learn on several processes, one file is kept.

torchrun --nproc-per-node 2 examples/finetune_ddp.py     (NCCL where there are GPUs, else gloo)

What to expect: inject and freeze before DDP wraps the net, in every process alike; the wrapped net is looked through by
`ai.param_groups` and `ai.save`. Each process sees its share of the images, the weights stay equal to the bit. For whole
trainings `torchrun … -m attninject finetune` does all of it.
"""

import tempfile

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import attninject as ai

EPOCHS = 2


def main() -> None:
    """One process of several; `torchrun` says which."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, device = dist.get_rank(), torch.device("cuda", dist.get_node_local_rank()) if gpu else "cpu"

    torch.manual_seed(0)  # the same blocks everywhere; DDP sends those of the first process anyway
    model = ai.inject(torchvision.models.resnet18(num_classes=4), "cbam_resnet").to(device)
    ai.freeze(model)  # now: DDP takes note of what learns
    ddp = DistributedDataParallel(model, device_ids=[device.index] if gpu else None)
    optimizer = torch.optim.AdamW(ai.param_groups(ddp, attn_lr=1e-3, head_lr=1e-3))

    data = TensorDataset(torch.randn(16, 3, 64, 64), torch.arange(16) % 4)
    sampler: DistributedSampler = DistributedSampler(data)
    ddp.train()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(data, batch_size=4, sampler=sampler):
            loss = torch.nn.functional.cross_entropy(ddp(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    learnt = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    everywhere = [torch.empty_like(learnt) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, learnt)
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            ai.save(ddp, f"{folder}/run.safetensors")  # in the first process alone
        print(f"{dist.get_world_size()} processes, {ai.trainable(ddp)} parameters learn")
        print(f"the same in all: {all(torch.equal(learnt, other) for other in everywhere)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
