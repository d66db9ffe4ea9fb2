"""A tower that keeps things local, and a small decoder that answers for a named object. Both are trained here.

The tower's receptive field is 31 pixels, four tokens, and it has no normalisation over the image: a token cannot know
what is elsewhere. So what a reducer hands on is what there is.
"""

from itertools import pairwise

import torch
from table import SIDE, Table
from torch import Tensor, nn
from torch.nn import functional

GRID, WIDTH, WORDS = 16, 64, 8
HIDDEN, LAYERS, HEADS = 96, 3, 4
# Pixels within which the object's centre must be told.
TOLERANCE = 4.0
# A token whose centre is this near to an object's, in pixels, has to name it.
NEAR = 6.5


class Tower(nn.Module):
    """Pictures uint8 [b, 128, 128, 3] to feature maps [b, 16, 16, 64]."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 16, 24, 48)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(channels[-1], WIDTH, 3, 1, 1))
        self.places = nn.Linear(WIDTH // 2, WIDTH)
        self.waves: Tensor
        self.register_buffer("waves", _waves())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolutions(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        features = features.permute(0, 2, 3, 1) + self.places(self.waves)
        for block in self.blocks:
            features = features + block(features)
        result: Tensor = self.norm(features)
        return result


def _waves() -> Tensor:
    """Sines and cosines of the place of each token, [16, 16, 32]."""
    at = (torch.arange(GRID) + 0.5) / GRID
    angles = at[:, None] * 2 ** torch.arange(WIDTH // 8) * torch.pi / 2
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([axis[None].expand(GRID, -1, -1), axis[:, None].expand(-1, GRID, -1)], dim=-1)


class Layer(nn.Module):
    """The words attend to each other, and then to the visual tokens, as an action expert's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))
        self.own, self.own_out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.ask, self.seen, self.seen_out = (nn.Linear(HIDDEN, n * HIDDEN) for n in (1, 2, 1))
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))

    def forward(self, words: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """(words, attention [b, heads, words, visual tokens])."""
        questions = len(words) // len(visual)
        query, key, value = (_heads(part) for part in self.own(self.norms[0](words)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        words = words + self.own_out(mixed.transpose(1, 2).flatten(2))
        query = _heads(self.ask(self.norms[1](words)))
        key, value = (_heads(part).repeat_interleave(questions, 0) for part in self.seen(visual).chunk(2, -1))
        attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        words = words + self.seen_out((attention @ value).transpose(1, 2).flatten(2))
        return words + self.mlp(self.norms[2](words)), attention


def _heads(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Decoder(nn.Module):
    """Visual tokens and the name of an object, two words, to its place (x, y) and its heading."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.question = nn.Parameter(torch.randn(HIDDEN) * 0.1)
        self.visual, self.visual_norm = nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.answer = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 6))

    def forward(self, tokens: Tensor, names: Tensor, kept: int | None = None) -> Tensor:
        """Answers [b, 6]: (x, y) from -2 to 2, and four headings.

        Args:
            tokens: [b, k, 64], or [b / q, k, 64] if q questions in a row are about the same tokens.
            names: int64 [b, 2], colour and shape.
            kept: Keep only so many tokens after the first layer, those that it attends to most: FastV's rule.
        """
        visual = self.visual_norm(self.visual(tokens))
        words = torch.cat([self.words(names), self.question.expand(len(names), 1, -1)], dim=1)
        for number, layer in enumerate(self.layers):
            words, attention = layer(words, visual)
            if kept is not None and number == 0:
                index = attention.mean((1, 2)).topk(kept).indices
                visual = visual.repeat_interleave(len(names) // len(visual), 0)
                visual = visual.gather(1, index[..., None].expand(-1, -1, HIDDEN))
        answer: Tensor = self.answer(words[:, -1])
        return answer

    def instruction(self, names: Tensor) -> Tensor:
        """What a sampler gets of the name, [b, 64]."""
        mean: Tensor = self.words(names).mean(1)
        return mean[:, :WIDTH]


def loss_of(answers: Tensor, places: Tensor, headings: Tensor) -> Tensor:
    """Loss of answers [b, 6] for places [b, 2] in [0, 1] and headings [b]."""
    place = functional.smooth_l1_loss(answers[:, :2], (places - 0.5) * 4, beta=0.1)
    return 4 * place + 0.5 * functional.cross_entropy(answers[:, 2:], headings)


def is_right(answers: Tensor, places: Tensor, headings: Tensor) -> Tensor:
    """Whether an answer has the place within `TOLERANCE` and the heading, bool [b]."""
    apart = (answers[:, :2] / 4 + 0.5 - places).norm(dim=-1) * SIDE
    return (apart < TOLERANCE) & (answers[:, 2:].argmax(-1) == headings)


def train_tower(table: Table, steps: int, batch: int = 32) -> Tower:
    """Train a tower to name the object at each token, its heading and its offset. It never hears an instruction."""
    torch.manual_seed(0)
    tower, heads = Tower(), nn.Linear(WIDTH, 4 + 4 + 4 + 2 + 1)
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(table), (batch,))
        nearest, offset, near = _labels(table, index)
        outputs = heads(tower(table.images[index]).flatten(1, 2))
        kind, heading = (part[index].gather(1, nearest)[near] for part in (table.kinds, table.headings))
        at = outputs[near]
        loss = functional.binary_cross_entropy_with_logits(outputs[..., 14], near.float(), pos_weight=torch.tensor(4.0))
        for logits, labels in ((at[:, :4], kind // 4), (at[:, 4:8], kind % 4), (at[:, 8:12], heading)):
            loss = loss + functional.cross_entropy(logits, labels)
        loss = loss + (at[:, 12:14] - offset[near]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tower.eval().requires_grad_(False)


def _labels(table: Table, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token: the nearest object [b, n], its offset in tokens [b, n, 2], whether it is near [b, n]."""
    axis = (torch.arange(GRID) + 0.5) * SIDE / GRID
    tokens = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
    centres = table.centres[index]
    distance, nearest = torch.cdist(tokens.expand(len(index), -1, -1), centres).min(-1)
    offset = (centres.gather(1, nearest[..., None].expand(-1, -1, 2)) - tokens) * GRID / SIDE
    return nearest, offset, distance < NEAR
