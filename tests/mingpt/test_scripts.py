"""minGPT's modules for scripts: programs like its adder and chargpt, shortened, and the parts that they use."""

import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

import mingpt
from mingpt.bpe import BPETokenizer
from mingpt.model import GPT, GPTConfig
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, set_seed, setup_logging


class Sums(Dataset):
    """All sums of two numbers of ``ndigit`` digits, such as 8550531 for 85 + 50 = 135."""

    @staticmethod
    def get_default_config():
        return CfgNode(ndigit=2)

    def __init__(self, config, split):
        self.config = config
        pairs = torch.randperm(100**config.ndigit, generator=torch.Generator().manual_seed(1337))
        held_out = min(len(pairs) // 5, 500)
        self.pairs = pairs[:held_out] if split == "test" else pairs[held_out:]

    def get_vocab_size(self):
        return 10

    def get_block_size(self):
        return 3 * self.config.ndigit

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        n = self.config.ndigit
        a, b = divmod(int(self.pairs[index]), 10**n)
        row = torch.tensor([int(digit) for digit in f"{a:0{n}}{b:0{n}}" + f"{a + b:0{n + 1}}"[::-1]])
        targets = row[1:].clone()
        targets[: 2 * n - 1] = -1
        return row[:-1], targets


class Characters(Dataset):
    """Windows of a text, as chargpt's data set."""

    def __init__(self, text, block_size):
        self.block_size = block_size
        self.chars = sorted(set(text))
        self.ids = torch.tensor([self.chars.index(char) for char in text])

    def __len__(self):
        return len(self.ids) - self.block_size

    def __getitem__(self, index):
        window = self.ids[index : index + self.block_size + 1]
        return window[:-1], window[1:]


@pytest.fixture
def config(tmp_path):
    """The config of a script, as minGPT's scripts put it together."""
    found = CfgNode()
    found.system = CfgNode()
    found.system.seed = 3407
    found.system.work_dir = str(tmp_path / "out" / "adder")
    found.data = Sums.get_default_config()
    found.model = GPT.get_default_config()
    found.model.model_type = "gpt-nano"
    found.trainer = Trainer.get_default_config()
    found.trainer.learning_rate = 5e-3
    found.merge_from_args(["--trainer.num_workers=0", "--trainer.device=cpu"])
    return found


def test_adder_script(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adder.py", "--data.ndigit=1", "--trainer.max_iters=60"])
    config.merge_from_args(sys.argv[1:])
    assert "command line overwriting config attribute data.ndigit with 1\n" in capsys.readouterr().out
    setup_logging(config)
    set_seed(config.system.seed)
    train, test = Sums(config.data, "train"), Sums(config.data, "test")
    config.model.vocab_size, config.model.block_size = train.get_vocab_size(), train.get_block_size()
    model = GPT(config.model)
    trainer = Trainer(config.trainer, model, train)
    losses, right = [], {}

    def on_batch_end(trainer):
        losses.append(trainer.loss.item())
        assert trainer.iter_num == len(losses) - 1 and trainer.iter_dt >= 0
        if trainer.iter_num % 59 == 0:
            model.eval()
            answers = []
            for idx, targets in DataLoader(test, batch_size=100):
                out = model.generate(idx[:, :2].to(trainer.device), 2, do_sample=False)
                answers.append((out[:, -2:] == targets[:, -2:]).float().mean())
            right[trainer.iter_num] = float(torch.stack(answers).mean())
            torch.save(model.state_dict(), os.path.join(config.system.work_dir, "model.pt"))
            model.train()

    trainer.set_callback("on_batch_end", on_batch_end)
    trainer.run()
    assert trainer.iter_num == 60 == len(losses)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]) and right[59] > right[0]
    folder = os.listdir(config.system.work_dir)
    assert sorted(folder) == ["args.txt", "config.json", "model.pt"]
    with open(os.path.join(config.system.work_dir, "args.txt"), encoding="utf-8") as file:
        assert file.read() == "adder.py --data.ndigit=1 --trainer.max_iters=60"
    with open(os.path.join(config.system.work_dir, "config.json"), encoding="utf-8") as file:
        saved = json.load(file)
    assert saved["model"]["model_type"] == "gpt-nano" and saved["trainer"]["betas"] == [0.9, 0.95]


def test_chargpt_script(config, text_file, capsys):
    config.model.merge_from_dict({"model_type": None, "n_layer": 1, "n_head": 2, "n_embd": 16})
    config.merge_from_args(["--trainer.max_iters=3", "--trainer.batch_size=4", "--trainer.betas=(0.9, 0.99)"])
    text = text_file.read_text()
    data = Characters(text, block_size=8)
    config.model.vocab_size, config.model.block_size = len(data.chars), data.block_size
    trainer = Trainer(config.trainer, GPT(config.model), data)
    assert "running on device cpu\n" in capsys.readouterr().out
    called = []
    trainer.add_callback("on_batch_end", lambda trainer: called.append(0))
    trainer.set_callback("on_batch_end", lambda trainer: called.append(1))
    trainer.add_callback("on_batch_end", lambda trainer: called.append(2))
    trainer.run()
    assert called == 3 * [1, 2]
    x = torch.tensor([data.chars.index(char) for char in "the cat"])[None].to(trainer.device)
    y = trainer.model.generate(x, 20, temperature=1.0, do_sample=True, top_k=10)[0]
    assert "".join(data.chars[int(i)] for i in y).startswith("the cat") and len(y) == 27
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_trainer_computes_what_a_hand_written_loop_does(config):
    """The reference draws, steps and clips as minGPT does, with torch's own parts."""
    config.trainer.merge_from_dict({"max_iters": 4, "batch_size": 8, "weight_decay": 0.5, "learning_rate": 1e-2})
    config.model.merge_from_dict({"vocab_size": 10, "block_size": 6, "attn_pdrop": 0.0})
    data = Sums(config.data, "train")
    losses, expected = [], []

    set_seed(1)
    trainer = Trainer(config.trainer, GPT(config.model), data)
    trainer.set_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()

    set_seed(1)
    model = GPT(config.model)
    decaying = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "lm_head.weight")
    names = [name for name, _ in model.named_parameters()]
    groups = [
        {"params": [model.get_parameter(n) for n in names if n.endswith(decaying)], "weight_decay": 0.5},
        {"params": [model.get_parameter(n) for n in names if not n.endswith(decaying)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    sampler = RandomSampler(data, replacement=True, num_samples=10**10)
    for _, (x, y) in zip(range(4), DataLoader(data, sampler=sampler, batch_size=8), strict=False):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())

    assert losses == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(trainer.optimizer.param_groups, groups, strict=True):
        assert ours["weight_decay"] == theirs["weight_decay"]
        # The order decides which state of a saved optimizer belongs to which parameter.
        assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]
    for name, weight in trainer.model.state_dict().items():
        if not name.endswith("c_attn.bias"):  # a key's bias has no effect, so Adam scales the noise of its gradient
            torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_config_node():
    node = CfgNode(a=1, model=CfgNode(n_layer=2, name="x"))
    assert str(node) == "a: 1\nmodel:\n    n_layer: 2\n    name: x"
    assert node.to_dict() == {"a": 1, "model": {"n_layer": 2, "name": "x"}}
    node.merge_from_args(["--model.n_layer=10", "--model.name=gpt-mini=large", "--a=[1, 2]"])
    assert node.to_dict() == {"a": [1, 2], "model": {"n_layer": 10, "name": "gpt-mini=large"}}
    node.model.merge_from_dict({"n_head": 3})
    assert node.model.n_head == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--a", "--a: expected --name=value"),
        ("a=1", "a=1: expected --name=value"),
        ("--model.n_layers=1", "--model.n_layers: the config has no n_layers there; it has n_layer"),
        ("--a.b=1", "--a.b: the config has no b there; it has nothing"),
    ],
)
def test_config_node_refuses_bad_arguments(argument, message):
    node = CfgNode(a=1, model=CfgNode(n_layer=2))
    with pytest.raises(ValueError, match=message):
        node.merge_from_args([argument])
    assert node == CfgNode(a=1, model=CfgNode(n_layer=2))


def test_model_accepts_a_config_node_with_other_attributes():
    node = CfgNode(model_type="gpt-nano", vocab_size=5, block_size=4, comment="mine")
    assert GPT(node).config == GPT(GPTConfig("gpt-nano", vocab_size=5, block_size=4)).config
    assert node.to_dict() == {"model_type": "gpt-nano", "vocab_size": 5, "block_size": 4, "comment": "mine"}


def test_set_seed_seeds_every_generator():
    draws = []
    for _ in range(2):
        set_seed(7)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_modules_of_the_package():
    assert mingpt.model.GPT is GPT and mingpt.trainer.Trainer is Trainer and mingpt.utils.CfgNode is CfgNode
    assert mingpt.bpe.BPETokenizer is BPETokenizer
    with pytest.raises(AttributeError, match="no attribute models"):
        mingpt.models  # noqa: B018


def test_bpe_tokenizer(gpt2_tables):
    tokenizer = BPETokenizer()
    idx = tokenizer("Hello world")
    assert idx.tolist() == [[15496, 995]] and idx.dtype == torch.int64
    assert tokenizer.decode(idx[0]) == "Hello world"
    assert tokenizer.encoder.encoder["\u0120world"] == 995 and tokenizer.encoder.decoder[995] == "\u0120world"
    assert tokenizer.encoder.encoder["<|endoftext|>"] == 50256 and len(tokenizer.encoder.encoder) == 50257
    text = "<|endoftext|> is text, na\u00efve \U0001f600"
    assert tokenizer.encoder.decode(tokenizer.encoder.encode(text)) == text
    with pytest.raises(ValueError, match=r"one text, \(T,\), not \(1, 2\)"):
        tokenizer.decode(idx)
    with pytest.raises(ValueError, match='return_tensors="pt"'):
        tokenizer("Hello", return_tensors="np")
