"""SOAA once more, in numpy, as the formulas stand. Slow, never optimised: the tests hold the package to it.

Parameters are a list of groups; a group is a dict with ``x`` (a list of float64 arrays), ``lr``, ``betas``, ``eps``,
``weight_decay``. Step numbers are those of the published rule (arXiv 2410.02293).
"""

import numpy as np


class ReferenceSOAA:
    def __init__(self, groups, rule, *, total_steps=0, gamma=0.25, radius=1.0, options=None):
        self.groups, self.rule = groups, rule
        self.total_steps, self.gamma, self.options = total_steps, gamma, options or {}
        self.d, self.loss_ema, self.p, self.t = radius, 0.0, 0.0, 0
        self.lr_unit = max(group["lr"] for group in groups)
        self.initial_lrs = [group["lr"] for group in groups]
        self.phase, self.unchecked, self.steady, self.scale, self.annealing = 1, 0, 0, 0.0, 1.0
        self.eaten, self.fresh = [0.0, 0.0], [0.0, 0.0]  # weighted sum, sum of weights
        self.checked, self.slope = None, None  # (step, gradient of it), and what the next gradient found of the slope
        self.found = None  # (promised, left) of each parameter since the last check
        self.gate = Gate()
        if rule == "ratio":
            self.d = 0.0
        for group in groups:
            self.begin(group)
        self.skipped, self.outliers, self.trials, self.gap, self.noise = 0, 0, 0, None, 0.0
        self.largest = 0.0
        self.doubts = 0  # checks at the floor in which the loss did not follow its gradient; from 3 on slopes steer
        self.unit = None  # root mean square of the gradients at the last check

    @staticmethod
    def begin(group):
        """Give a group its state."""
        group["m"] = [np.zeros_like(x) for x in group["x"]]
        group["v"] = [np.zeros_like(x) for x in group["x"]]
        group["t"] = [0 for _ in group["x"]]
        group["portion"] = [1.0 for _ in group["x"]]
        group["means"] = [(0.0, 0.0) for _ in group["x"]]  # of what was promised, and what was left of it

    def everything(self):
        for group in self.groups:
            for i in range(len(group["x"])):
                yield group, i

    def corrected(self, group, i):
        """Step 2."""
        b1, b2 = group["betas"]
        t = group["t"][i]
        return group["m"][i] / (1 - b1**t), group["v"][i] / (1 - b2**t)

    def fisher_factor(self):
        """The bracket of step 3; both sums run over all parameters of all groups."""
        top, bottom = 0.0, 0.0
        for group, i in self.everything():
            if group["t"][i]:
                mh, vh = self.corrected(group, i)
                top += np.sum(mh * mh)
                bottom += np.sum(vh + group["eps"])
        return 1 + top / bottom

    def direction(self, group, i, c, d):
        """Steps 3 to 5."""
        mh, vh = self.corrected(group, i)
        fisher = c * vh
        r = np.maximum(d * fisher, np.sqrt(vh))
        return d * mh / (r + group["eps"])

    def box_direction(self, group, i, d):
        """The same without the Fisher, eps in units of the gradients' root mean square."""
        mh, vh = self.corrected(group, i)
        return d * mh / (np.sqrt(vh) + group["eps"] * self.unit)

    def gradient_rms(self):
        found = [self.corrected(g, k)[1] for g, k in self.everything() if g["t"][k]]
        return max(1e-15, np.sqrt(sum(np.sum(v) for v in found) / max(1, sum(v.size for v in found))))

    def step(self, grads, loss, loss_at=None):
        """`grads` mirrors the groups' ``x``; `loss_at()` is the loss at the current ``x``."""
        if not (np.isfinite(loss) and all(np.all(np.isfinite(g)) for group in grads for g in group)):
            self.skip()
            self.skipped += 1
            return
        if self.rule == "ratio" and self.gate.leaves_out(grads, loss):
            self.skip()
            self.outliers += 1
            return
        if self.checked is not None:
            s, before = self.checked
            promised = [-np.sum(g * b) for g, b in zip(before, s, strict=True)]
            left = [
                -np.sum(g * b) for g, b in zip([g for gs in grads for g in gs], s, strict=False)
            ]  # new ones are last
            there = [p > 0 for p in promised]
            self.slope = sum(np.array(left)[there]) / sum(np.array(promised)[there])
            self.found = (promised, left)
        self.checked = None
        for (group, i), g in zip(self.everything(), [g for gs in grads for g in gs], strict=True):
            b1, b2 = group["betas"]
            group["m"][i] = b1 * group["m"][i] + (1 - b1) * g  # step 1
            group["v"][i] = b2 * group["v"][i] + (1 - b2) * g * g
            group["t"][i] += 1
        c = self.fisher_factor()
        {"fixed": self.fixed, "published": self.published, "ratio": self.ratio}[self.rule](grads, loss, loss_at, c)

    def skip(self):
        """Nothing moves. Where the host has not read the loss the parameters' age counts the step all the same."""
        due = self.rule == "ratio" and self.check_due()
        self.checked = self.checked if due else None
        self.trials += due  # they were under way before the host knew
        if self.rule == "fixed" or (self.rule == "ratio" and not due):
            for group, i in self.everything():
                group["t"][i] += 1
            self.unchecked += 1

    def fixed(self, grads, loss, loss_at, c):
        for group, i in self.everything():
            u = self.direction(group, i, c, self.d)
            group["x"][i] = group["x"][i] - group["lr"] * group["weight_decay"] * group["x"][i] - group["lr"] * u

    def published(self, grads, loss, loss_at, c):
        promised = 0.0
        for group, i in self.everything():
            mh, vh = self.corrected(group, i)
            u = self.direction(group, i, c, self.d)
            group["x"][i] = group["x"][i] - group["lr"] * group["weight_decay"] * group["x"][i] - group["lr"] * u  # 6
            promised += group["lr"] * (np.sum(mh * u) - np.sum(vh * u * u) / 2)  # step 10
        b1, eps = self.groups[0]["betas"][0], self.groups[0]["eps"]
        self.t += 1
        self.loss_ema = b1 * self.loss_ema + (1 - b1) * loss  # step 7
        lh = self.loss_ema / (1 - b1**self.t)
        rho = (lh - loss) / max(self.p, eps)  # step 8
        power = (self.t - 1) / self.total_steps
        self.d = min(1 + self.gamma**power, max((1 - self.gamma) ** power, self.d * rho))  # step 9
        self.p = promised

    def check_due(self):
        sought = self.phase > 0 or self.doubts in (1, 2)
        return sought or self.unchecked + 1 >= self.options["interval"] * (1 + min(3, self.steady // 4))

    def ratio(self, grads, loss, loss_at, c):
        """The learning rate is folded into the radius; a check compares the loss at start + s with -(g . s)."""
        places, grads = list(self.everything()), [g for gs in grads for g in gs]
        portions = [group["portion"][i] for group, i in places]
        start = [group["x"][i] for group, i in places]
        due = self.check_due()
        self.unchecked = 0 if due else self.unchecked + 1
        if due or self.unit is None:
            self.unit = self.gradient_rms()
        rms = np.sqrt(sum(np.sum(x * x) for x in start) / sum(x.size for x in start))
        if self.d == 0:
            self.trials += 1
            self.gap = loss_at() - loss  # what a loss that is not the same twice differs by
            self.d = self.bounds(rms)[0]
        f = max(group["lr"] for group in self.groups) / self.lr_unit
        for attempt in range(1, 1 + (self.options["max_trials"] if due else 1)):
            alphas = [self.d * (group["lr"] / self.lr_unit) for group, _ in places]
            u = [self.box_direction(group, i, alpha) for (group, i), alpha in zip(places, alphas, strict=True)]
            u = [a * portion for a, portion in zip(u, portions, strict=True)]
            s = [-np.where(a * g > 0, a, 0.0) for a, g in zip(u, grads, strict=True)]
            if due:
                self.trials += 1
                self.put([a + b for a, b in zip(start, s, strict=True)])
                promised = -sum(np.sum(g * b) for g, b in zip(grads, s, strict=True))
                kept, again = self.judge(promised, loss - loss_at(), loss, rms, f)
                if not kept:
                    self.put(start)
                    if again and attempt < self.options["max_trials"]:
                        continue
                    self.slope = None
                    self.move_portions()
                    return
                self.slope = None
                self.move_portions()
                self.checked = (s, grads) if promised > 0 else None
            decays = [min(1.0, alpha * group["weight_decay"]) for (group, _), alpha in zip(places, alphas, strict=True)]
            self.put([a - decay * a + b for a, b, decay in zip(start, s, decays, strict=True)])
            return

    def move_portions(self):
        """A tensor whose slope is left beside that of the others goes further, one whose slope has turned less far."""
        if self.found is None:
            return
        places = list(self.everything())
        told = [p > 0 for p in self.found[0]] + [False] * (len(places) - len(self.found[0]))
        for (group, i), p, q in zip(places, *self.found, strict=False):
            if p > 0:
                before = group["means"][i]
                group["means"][i] = (0.8 * before[0] + 0.2 * p, 0.8 * before[1] + 0.2 * q)
        self.found = None
        if not any(told):
            return
        means = np.array([group["means"][i] for group, i in places])
        clip = lambda x: np.clip(x, -2, 2)  # noqa: E731
        overall = clip(means[told, 1].sum() / means[told, 0].sum())
        logs = np.log([group["portion"][i] for group, i in places])
        beyond = clip(means[told, 1] / means[told, 0]) - overall
        shrinks = 1 / (1 + 0.03 * means[told, 0].sum() / means[told, 0])
        logs[told] = 0.99 * logs[told] + 0.3 * np.where(beyond > 0, 1.0, shrinks) * beyond
        mean = np.average(logs, weights=means[:, 0])
        for (group, i), value, tells in zip(places, logs, told, strict=True):
            if tells:
                group["portion"][i] = np.exp(np.clip(value - mean, -np.log(32), np.log(32)))

    def put(self, points):
        for (group, i), x in zip(self.everything(), points, strict=True):
            group["x"][i] = x

    def bounds(self, rms):
        """Floor, prior and ceiling of the radius."""
        rms = max(rms, 1e-3)
        prior = self.options["relative"] * (min(rms, self.scale) if self.scale else rms)
        return max(1e-3 * prior, np.finfo(float).eps * rms), prior, 10 * prior

    def annealed(self, f):
        """What is left of the prior: nothing is taken that the schedule takes."""
        return min(1.0, self.annealing / f) if 0 < f < 1 else self.annealing

    def judge(self, promised, actual, loss, rms, f):
        """Return whether the trial is kept, and if not, whether another may follow; the radius moves either way."""
        low, prior, high = self.bounds(rms)
        prior *= self.annealed(f)
        self.largest = max(self.largest, abs(loss))
        if promised == 0:
            return True, False
        self.noise = max(0.9 * self.noise, actual - 2 * abs(promised) if np.isfinite(actual) else 0.0)
        noise = 8 * np.finfo(float).eps * abs(loss) + abs(self.gap) + self.noise
        floor = self.d <= low
        bad = not np.isfinite(actual) or promised - actual > 2 * abs(promised) + noise
        slopes = self.doubts >= 3
        if bad and not ((floor or slopes) and np.isfinite(actual)):
            if self.phase and not floor:
                self.phase, self.scale = 0, self.scale or prior / self.options["relative"]
            self.d, self.steady = max(low, self.d / 2), 0
            return False, not floor
        known = abs(promised) > noise
        memory = 0.5 if self.phase else 0.8
        share, tells = min(2.0, max(0.0, (promised - actual) / abs(promised))), known and not (floor and self.phase)
        if slopes:
            known = tells = self.slope is not None
            share = (1 - min(1.0, max(-2.0, self.slope))) / 2 if known else None
        if tells:
            self.eaten = [memory * old + (1 - memory) * new for old, new in zip(self.eaten, (share, 1), strict=True)]
        if self.slope is not None:
            slope = min(2.0, max(-2.0, self.slope))
            self.fresh = [memory * old + (1 - memory) * new for old, new in zip(self.fresh, (slope, 1), strict=True)]
        eaten, slope = (a / b if b else 0.0 for a, b in (self.eaten, self.fresh))
        excess = 1 - self.options["target"]
        long = known and self.eaten[1] > 0.5 and (eaten > 1 if slopes else eaten > excess and eaten + slope > excess)
        short = eaten < excess * min(1.0, max(0.05, f))
        radius, burning = self.d, self.phase
        if self.phase:
            again = self.scale > 0
            top = prior if again or f < 0.5 or not known else high
            held = self.d >= top
            self.steady = self.steady + min(1.0, f) if held else 0
            ends = long or self.steady > 20 or (self.d >= prior and (again or (known and not short)))
            if long:
                self.d *= 0.4
            elif not ends and not held:
                self.d = min(self.d * (1.35 if eaten < excess / 2 else 1.1), top)
            if ends:
                self.phase, self.steady = 0, 0
            else:
                self.phase = 1
            self.scale = self.scale or (prior / self.options["relative"] if ends else 0.0)
        else:
            grows = short and known and f > 0.05 and (slope > 0 or self.d < 0.99 * 3 * prior)
            self.steady = 0 if long or grows else self.steady + 1
            if long:
                self.d *= 0.7
            elif grows:
                self.phase = int(self.d < prior / 100 and eaten < excess / 2 * min(1.0, f))
                self.d = min(1.2 * self.d, max(self.d, (10 if slope > 0 else 3) * prior))
            elif self.d < prior:
                self.d = min(1.1 * self.d, prior)
            else:
                self.d = max(0.975 * self.d, prior)
        self.d = max(self.d, low)
        if not slopes and abs(promised) > max(noise, 1e-6 * self.largest):
            least = 3e-4 * high
            unlike = radius > least and share > excess / 2 and slope > 0.6 and slope + 2 * eaten > 1.5
            stuck = radius <= least and share > excess
            self.doubts = max(0, self.doubts + (1 if unlike or stuck else -1)) if radius < prior / 30 else 0
            if self.doubts == 3:
                self.phase, self.steady, self.eaten, eaten = 1, 0, [0.0, 0.0], 0.0
                self.scale, self.d = self.scale or prior / self.options["relative"], max(self.d, prior / 30)
        if not burning and abs(promised) > noise and abs(f - 1) < 1e-6:
            unexplained = slope - min(0.0, 1 - 2 * eaten)
            before = self.annealing
            self.annealing *= np.exp(0.2 * np.clip(unexplained, -1, 1) * self.fresh[1])
            self.annealing = np.clip(self.annealing, 0.01, 1)
            self.d = max(self.d, low) * min(1, self.annealing / before)
        self.d = max(self.d, low)
        return True, False


class Gate:
    """Which gradients are left out: log norm or loss far above the mean of the recent ones."""

    def __init__(self):
        self.seen, self.credit, self.means, self.variances = [0, 0], 3.0, [0.0, 0.0], [0.0, 0.0]
        self.peak = 0.0

    def leaves_out(self, grads, loss):
        square = sum(np.sum(g * g) for gs in grads for g in gs)
        return self.judge(square, loss)

    def judge(self, square, loss):
        if square == 0:
            return False
        there = [0] if loss is None else [0, 1]
        gaps = [np.log(square) / 2 - self.means[0], 0.0 if loss is None else loss - self.means[1]]
        highest = min(6 * np.sqrt(self.variances[0]) + np.log(3), self.peak + np.log(4))
        limits = [highest, 10 * np.sqrt(self.variances[1])]
        warm = [seen >= 5 for seen in self.seen]
        beyond = gaps[0] > np.log(2) or (loss is not None and loss > 10 * abs(self.means[1]))
        far = (warm[0] and gaps[0] > limits[0]) or (warm[1] and gaps[1] > limits[1] and beyond)
        out = far and self.credit >= 1
        if self.seen[0]:
            lifted = self.peak + 0.1 * max(0.0, min(gaps[0], highest) - self.peak)
            self.peak = lifted if far else max(0.999 * self.peak, gaps[0])
        for k in there:
            newest = 1 / (self.seen[k] + 1)
            share = max(0.01, newest)
            mild = max(-limits[k], min(limits[k], gaps[k])) if far else gaps[k]
            if not out:
                self.means[k] += gaps[k] if far else max(0.1, newest) * gaps[k]
            if self.seen[k]:
                self.variances[k] = (1 - share) * (self.variances[k] + share * mild**2)
            self.seen[k] += not out
        self.credit = self.credit - 1 if out else min(3.0, self.credit + 0.1)
        return out
