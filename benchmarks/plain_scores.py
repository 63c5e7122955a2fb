"""The scores of an ensemble as one would write them with scikit-learn, SciPy and loops, without lossray."""

import itertools

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import rel_entr, softmax
from sklearn.metrics import log_loss, zero_one_loss

BINS = 15


def all_scores(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The scores of the whole ensemble, in the order of lossray.ensembles.scores.Scores."""
    members = [softmax(member.astype(np.float64), axis=1) for member in logits]
    pooled = np.mean(members, axis=0)
    temperature = _temperature(pooled, targets)
    means = np.mean([_own(member, targets) for member in members], axis=0)
    diversity = [pairs[np.triu_indices(len(logits), 1)].mean() for pairs in all_pairs(logits)]
    return np.array([*_pooled_scores(pooled, targets, temperature), *means, *diversity])


def all_prefixes(
    validation: np.ndarray, validation_targets: np.ndarray, test: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """The same of the first 1, 2, ... members, on validation and on test."""
    splits = ((validation, validation_targets), (test, targets))
    pairs = [all_pairs(logits) for logits, _ in splits]
    sums, own, rows = [0.0, 0.0], [[], []], []
    for m in range(1, len(test) + 1):
        for s, (logits, truth) in enumerate(splits):
            member = softmax(logits[m - 1].astype(np.float64), axis=1)
            sums[s] = sums[s] + member
            own[s].append(_own(member, truth))
        temperature = _temperature(sums[0] / m, validation_targets)
        for s, (_, truth) in enumerate(splits):
            scores = _pooled_scores(sums[s] / m, truth, temperature)
            diversity = [_mean_of_pairs(values[:m, :m]) for values in pairs[s]]
            rows.append([*scores, *np.mean(own[s], axis=0), *diversity])
    return np.array(rows)


def all_pairs(logits: np.ndarray) -> np.ndarray:
    """Disagreement and symmetrised divergence of all pairs, [2, K, K]."""
    members = [softmax(member.astype(np.float64), axis=1) for member in logits]
    predicted = [member.argmax(axis=1) for member in members]
    found = np.zeros((2, len(logits), len(logits)))
    for i, j in itertools.combinations(range(len(logits)), 2):
        there, back = (
            rel_entr(members[i], members[j]).sum(axis=1),
            rel_entr(members[j], members[i]).sum(axis=1),
        )
        found[:, i, j] = np.mean(predicted[i] != predicted[j]), (there + back).mean() / 2
        found[:, j, i] = found[:, i, j]
    return found


def _mean_of_pairs(values: np.ndarray) -> float:
    return values[np.triu_indices(len(values), 1)].mean() if len(values) > 1 else np.nan


def _own(probabilities: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Error and NLL."""
    labels = np.arange(probabilities.shape[1])
    return zero_one_loss(targets, probabilities.argmax(axis=1)), log_loss(
        targets, probabilities, labels=labels
    )


def _pooled_scores(pooled: np.ndarray, targets: np.ndarray, temperature: float) -> list[float]:
    error, nll = _own(pooled, targets)
    scaled = softmax(np.log(pooled) / temperature, axis=1)
    raw = [nll, *_calibration(pooled, targets)]
    _, nll_scaled = _own(scaled, targets)
    return [error, *raw, _aurc(pooled, targets), nll_scaled, *_calibration(scaled, targets), temperature]


def _calibration(probabilities: np.ndarray, targets: np.ndarray) -> tuple[float, float, float]:
    """Brier score, and expected calibration errors with bins of equal width and of equal mass."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    brier = np.mean(np.sum((probabilities - np.eye(probabilities.shape[1])[targets]) ** 2, axis=1))
    ece = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    order = np.argsort(confidence)
    edges = np.arange(BINS + 1) * len(order) // BINS
    adaptive = 0.0
    for low, high in itertools.pairwise(edges):
        inside = order[low:high]
        adaptive += len(inside) / len(order) * abs(right[inside].mean() - confidence[inside].mean())
    return brier, ece, adaptive


def _aurc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    order = np.argsort(-probabilities.max(axis=1))
    wrong = probabilities.argmax(axis=1)[order] != targets[order]
    return np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1))


def _temperature(pooled: np.ndarray, targets: np.ndarray) -> float:
    """By SciPy's bounded search in ln T."""
    logs, labels = np.log(pooled), np.arange(pooled.shape[1])

    def nll(log_temperature: float) -> float:
        return log_loss(targets, softmax(logs / np.exp(log_temperature), axis=1), labels=labels)

    return float(np.exp(minimize_scalar(nll, bounds=(-5, 5), method="bounded").x))
