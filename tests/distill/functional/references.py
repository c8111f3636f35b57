"""The papers' formulas once more: sums and loops over plain numbers in float64, nothing shared with the package."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

Numbers = list[float]


def softmax(logits: Any, temperature: float = 1.0) -> Numbers:
    exponents = [math.exp(float(z) / temperature) for z in logits]
    return [e / sum(exponents) for e in exponents]


def divergence(p: Numbers, q: Numbers) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def average(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def correlation(a: Numbers, b: Numbers) -> float:
    mean_a, mean_b = average(a), average(b)
    above = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    return above / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def dot(a: Any, b: Any) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b))


def norm(a: Any) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Any, b: Any) -> float:
    return dot(a, b) / (norm(a) * norm(b))


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


# Responses


def soft_target(student: Tensor, teacher: Tensor, temperature: float) -> float:
    rows = zip(student, teacher)
    return temperature**2 * average(divergence(softmax(t, temperature), softmax(s, temperature)) for s, t in rows)


def standardized_soft_target(student: Tensor, teacher: Tensor, temperature: float) -> float:
    def scaled(row: Tensor) -> Numbers:
        mean = average(row.tolist())
        deviation = math.sqrt(average((x - mean) ** 2 for x in row.tolist()))
        return [(x - mean) / deviation for x in row.tolist()]

    pairs = [(softmax(scaled(t), temperature), softmax(scaled(s), temperature)) for s, t in zip(student, teacher)]
    return temperature**2 * average(divergence(p, q) for p, q in pairs)


def decoupled(
    student: Tensor, teacher: Tensor, targets: Tensor, alpha: float, beta: float, temperature: float
) -> float:
    values = []
    for s, t, target in zip(student, teacher, targets.tolist()):
        q, p = softmax(s, temperature), softmax(t, temperature)
        y = target if target != -100 else p.index(max(p))
        others_p, others_q = [x for i, x in enumerate(p) if i != y], [x for i, x in enumerate(q) if i != y]
        binary = divergence([p[y], sum(others_p)], [q[y], sum(others_q)])
        among = divergence([x / sum(others_p) for x in others_p], [x / sum(others_q) for x in others_q])
        values.append(alpha * binary + beta * among)
    return temperature**2 * average(values)


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    q, p = [softmax(row, temperature) for row in student], [softmax(row, temperature) for row in teacher]
    between = average(1 - correlation(a, b) for a, b in zip(q, p))
    within = average(1 - correlation(list(a), list(b)) for a, b in zip(zip(*q), zip(*p)))
    return temperature**2 * (beta * between + gamma * within)


def logit_mse(student: Tensor, teacher: Tensor) -> float:
    return average((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist()))


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> float:
    return average(
        -sum(p * math.log(q) for p, q in zip(softmax(t, temperature), softmax(s))) for s, t in zip(student, teacher)
    )


def multi_label(student: Tensor, teacher: Tensor, temperature: float) -> float:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x / temperature))

    values = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        pairs = [(sigmoid(b), sigmoid(a)) for a, b in zip(s, t)]
        values.append(sum(divergence([p, 1 - p], [q, 1 - q]) for p, q in pairs))
    return temperature**2 * average(values)


def bounded_regression(student: Tensor, teacher: Tensor, targets: Tensor, margin: float) -> float:
    values = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), targets.tolist()):
        if any(map(math.isnan, y)):
            values.append(average((a - b) ** 2 for a, b in zip(s, t)))
            continue
        ours, theirs = average((a - b) ** 2 for a, b in zip(s, y)), average((a - b) ** 2 for a, b in zip(t, y))
        values.append(ours if ours + margin > theirs else 0.0)
    return average(values)


# Sequences


def token_soft_target(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> float:
    kept = [(student[n, i], teacher[n, i]) for n, i in mask.nonzero().tolist()]
    return temperature**2 * average(divergence(softmax(t, temperature), softmax(s, temperature)) for s, t in kept)


def cosine_embedding(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    return average(1 - cosine(student[n, i], teacher[n, i]) for n, i in mask.nonzero().tolist())


def hidden_states(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    return average(
        (float(student[n, i, d]) - float(teacher[n, i, d])) ** 2
        for n, i in mask.nonzero().tolist()
        for d in range(student.shape[2])
    )


def attention_maps(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    num, heads, length, _ = student.shape
    return average(
        (float(student[n, h, i, j]) - float(teacher[n, h, i, j])) ** 2
        for n, h, i, j in itertools.product(range(num), range(heads), range(length), range(length))
        if mask[n, i] and mask[n, j]
    )


def self_attention_relation(student: Tensor, teacher: Tensor, mask: Tensor, num_heads: int) -> float:
    def relation(tokens: Tensor, n: int, head: int, i: int) -> Numbers:
        size = tokens.shape[2] // num_heads
        parts = tokens[n, :, head * size : (head + 1) * size]
        seen = [j for j in range(tokens.shape[1]) if mask[n, j]]
        return softmax([dot(parts[i], parts[j]) / math.sqrt(size) for j in seen])

    return average(
        divergence(relation(teacher, n, head, i), relation(student, n, head, i))
        for n, i in mask.nonzero().tolist()
        for head in range(num_heads)
    )


# Maps: (N, C, H, W)


def positions(maps: Tensor) -> list[tuple[int, int]]:
    return list(itertools.product(range(maps.shape[2]), range(maps.shape[3])))


def hint(student: Tensor, teacher: Tensor) -> float:
    return 0.5 * average((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist()))


def attention_transfer(student: Tensor, teacher: Tensor, power: float) -> float:
    def attention(sample: Tensor) -> Numbers:
        values = [
            sum(abs(float(sample[c, y, x])) ** power for c in range(len(sample)))
            for y, x in itertools.product(range(sample.shape[1]), range(sample.shape[2]))
        ]
        return [v / norm(values) for v in values]

    return average(average((a - b) ** 2 for a, b in zip(attention(s), attention(t))) for s, t in zip(student, teacher))


def similarity_preserving(student: Tensor, teacher: Tensor) -> float:
    def rows(maps: Tensor) -> list[Numbers]:
        flat = maps.flatten(1).tolist()
        gram = [[dot(a, b) for b in flat] for a in flat]
        return [[g / norm(row) for g in row] for row in gram]

    ours, theirs = rows(student), rows(teacher)
    return sum((a - b) ** 2 for x, y in zip(ours, theirs) for a, b in zip(x, y)) / len(student) ** 2


def neuron_selectivity(student: Tensor, teacher: Tensor, kernel: str) -> float:
    def unit(maps: Tensor) -> list[Numbers]:
        return [[v / norm(row) for v in row] for row in maps.flatten(1).tolist()]

    values = []
    for s, t in zip(student, teacher):
        ours, theirs = unit(s), unit(t)
        every = ours + theirs
        spread = average(dot(d, d) for a in every for b in every for d in [[x - y for x, y in zip(a, b)]])

        def k(a: Numbers, b: Numbers, spread: float = spread) -> float:
            if kernel == "linear":
                return dot(a, b)
            if kernel == "polynomial":
                return dot(a, b) ** 2
            return math.exp(-sum((x - y) ** 2 for x, y in zip(a, b)) / (2 * spread))

        values.append(
            average(k(a, b) for a in ours for b in ours)
            + average(k(a, b) for a in theirs for b in theirs)
            - 2 * average(k(a, b) for a in ours for b in theirs)
        )
    return average(values)


def flow(s_first: Tensor, s_last: Tensor, t_first: Tensor, t_last: Tensor) -> float:
    def gram(first: Tensor, last: Tensor, i: int, j: int) -> float:
        size = last.shape[-1]
        block = first.shape[-1] // size
        total = 0.0
        for y, x in itertools.product(range(size), range(size)):
            patch = first[i, y * block : (y + 1) * block, x * block : (x + 1) * block]
            total += float(patch.max()) * float(last[j, y, x])
        return total / size**2

    values = []
    for a, b, c, d in zip(s_first, s_last, t_first, t_last):
        pairs = itertools.product(range(len(a)), range(len(b)))
        values.append(sum((gram(a, b, i, j) - gram(c, d, i, j)) ** 2 for i, j in pairs))
    return average(values)


def margin_of(mean: float, std: float) -> float:
    """E[x | x < 0] by a sum over many small steps."""
    steps = [mean - 12 * std + (i + 0.5) * (12 * std - mean) / 200_000 for i in range(200_000)]
    weights = [math.exp(-(((x - mean) / std) ** 2) / 2) for x in steps]
    return math.fsum(x * w for x, w in zip(steps, weights)) / math.fsum(weights)


def overhaul(student: Tensor, teacher: Tensor, margin: Tensor) -> float:
    values = []
    for s, t in zip(student, teacher):
        total = 0.0
        for c, y, x in itertools.product(*map(range, s.shape)):
            goal, ours = max(float(t[c, y, x]), float(margin[c])), float(s[c, y, x])
            total += 0.0 if ours <= goal <= 0 else (ours - goal) ** 2
        values.append(total)
    return average(values)


def hierarchical_context(student: Tensor, teacher: Tensor) -> float:
    """For maps of 8x8, whose smaller sizes are 4, 2 and 1."""
    total, weights = 0.0, 0.0
    for level, size in enumerate((8, 4, 2, 1)):
        block = 8 // size

        def pooled(maps: Tensor, n: int, c: int, y: int, x: int, block: int = block) -> float:
            return average(maps[n, c, y * block : (y + 1) * block, x * block : (x + 1) * block].flatten().tolist())

        places = itertools.product(range(len(student)), range(student.shape[1]), range(size), range(size))
        distance = average((pooled(student, *place) - pooled(teacher, *place)) ** 2 for place in places)
        total, weights = total + distance / 2**level, weights + 1 / 2**level
    return total / weights


# Relations


def relational_distance(student: Tensor, teacher: Tensor) -> float:
    def distances(rows: Tensor) -> Numbers:
        pairs = itertools.permutations(rows.flatten(1).tolist(), 2)
        values = [norm([x - y for x, y in zip(a, b)]) for a, b in pairs]
        return [v / average(values) for v in values]

    return average(huber(a - b) for a, b in zip(distances(student), distances(teacher)))


def relational_angle(student: Tensor, teacher: Tensor) -> float:
    def angles(rows: Tensor) -> Numbers:
        triplets = itertools.permutations(rows.flatten(1).tolist(), 3)
        return [cosine([x - y for x, y in zip(i, j)], [x - y for x, y in zip(k, j)]) for i, j, k in triplets]

    return average(huber(a - b) for a, b in zip(angles(student), angles(teacher)))


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float, order: int) -> float:
    def kernel(a: Numbers, b: Numbers) -> float:
        powers = [(2 * gamma * cosine(a, b)) ** p / math.factorial(p) for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(powers)

    ours, theirs = student.flatten(1).tolist(), teacher.flatten(1).tolist()
    pairs = itertools.product(range(len(ours)), repeat=2)
    return average((kernel(ours[i], ours[j]) - kernel(theirs[i], theirs[j])) ** 2 for i, j in pairs)


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> float:
    def neighbours(rows: list[Numbers], i: int) -> Numbers:
        kernel = [(cosine(rows[i], row) + 1) / 2 for j, row in enumerate(rows) if j != i]
        return [k / sum(kernel) for k in kernel]

    ours, theirs = student.flatten(1).tolist(), teacher.flatten(1).tolist()
    return average(divergence(neighbours(theirs, i), neighbours(ours, i)) for i in range(len(ours)))


# Distributions


def variational(mean: Tensor, teacher: Tensor, variance: Tensor) -> float:
    normal = torch.distributions.Normal(mean, variance.sqrt()[:, None, None].expand_as(mean))
    return float(-normal.log_prob(teacher).mean()) - 0.5 * math.log(2 * math.pi)


def noise_contrastive(positive: Tensor, negative: Tensor, num_samples: int) -> float:
    ratio = negative.shape[1] / num_samples
    values = []
    for p, row in zip(positive.tolist(), negative.tolist()):
        values.append(-math.log(p / (p + ratio)) - sum(math.log(1 - n / (n + ratio)) for n in row))
    return average(values)


def maximum_mean_discrepancy(source: Tensor, target: Tensor) -> float:
    ours, theirs = source.tolist(), target.tolist()
    every = ours + theirs

    def distance(a: Numbers, b: Numbers) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b))

    spread = average(distance(a, b) for a in every for b in every)

    def k(a: Numbers, b: Numbers) -> float:
        return average(math.exp(-distance(a, b) / (f * spread)) for f in (0.25, 0.5, 1, 2, 4))

    return (
        average(k(a, b) for a in ours for b in ours)
        + average(k(a, b) for a in theirs for b in theirs)
        - 2 * average(k(a, b) for a in ours for b in theirs)
    )


def correlation_alignment(source: Tensor, target: Tensor) -> float:
    difference = torch.cov(source.T) - torch.cov(target.T)
    return float(difference.square().sum()) / (4 * source.shape[1] ** 2)
