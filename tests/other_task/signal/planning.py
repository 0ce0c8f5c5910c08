import torch


def held_out_example(config, count, original):
    noisy, clean = torch.empty(2, count, config.length)
    return {"noisy": noisy, "clean": clean, "index": torch.empty(count).long()}, [0.0] * count


def train_example(config):
    return held_out_example(config, config.batch_size, ())[0]
