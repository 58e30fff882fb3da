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
        self.phase, self.unchecked, self.eaten, self.weight = 2, 0, 0.0, 0.0
        if rule == "ratio":
            self.d = self.options["start"] * self.lr_unit
        for group in groups:
            group["m"] = [np.zeros_like(x) for x in group["x"]]
            group["v"] = [np.zeros_like(x) for x in group["x"]]
            group["t"] = [0 for _ in group["x"]]
        self.skipped, self.trials, self.gap = 0, 0, None

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

    def step(self, grads, loss, loss_at=None):
        """`grads` mirrors the groups' ``x``; `loss_at()` is the loss at the current ``x``."""
        if not (np.isfinite(loss) and all(np.all(np.isfinite(g)) for group in grads for g in group)):
            self.skip()
            return
        for (group, i), g in zip(self.everything(), [g for gs in grads for g in gs], strict=True):
            b1, b2 = group["betas"]
            group["m"][i] = b1 * group["m"][i] + (1 - b1) * g  # step 1
            group["v"][i] = b2 * group["v"][i] + (1 - b2) * g * g
            group["t"][i] += 1
        c = self.fisher_factor()
        {"fixed": self.fixed, "published": self.published, "ratio": self.ratio}[self.rule](grads, loss, loss_at, c)

    def skip(self):
        """Nothing moves. Where the host has not read the loss the parameters' age counts the step all the same."""
        self.skipped += 1
        due = self.rule == "ratio" and self.check_due()
        self.trials += due * (2 if self.gap is None else 1)  # they were under way before the host knew
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
        return self.phase > 0 or self.unchecked + 1 >= self.options["interval"]

    def ratio(self, grads, loss, loss_at, c):
        """The learning rate is folded into the radius; a check compares the loss at start + s with -(g . s)."""
        places = list(self.everything())
        start = [group["x"][i] for group, i in places]
        due = self.check_due()
        if due and self.gap is None:
            self.trials += 1
            self.gap = loss_at() - loss  # what a loss that is not the same twice differs by
        self.unchecked = 0 if due else self.unchecked + 1
        prior = self.options["relative"] * np.sqrt(sum(np.sum(x * x) for x in start) / sum(x.size for x in start))
        for _ in range(self.options["max_trials"] if due else 1):
            alphas = [self.d * group["lr"] / self.lr_unit for group, _ in places]
            u = [self.direction(group, i, c, alpha) for (group, i), alpha in zip(places, alphas, strict=True)]
            s = [-np.where(a * g > 0, a, 0.0) for a, g in zip(u, [g for gs in grads for g in gs], strict=True)]
            if due:
                self.trials += 1
                self.put([a + b for a, b in zip(start, s, strict=True)])
                promised = -sum(np.sum(g * b) for g, b in zip([g for gs in grads for g in gs], s, strict=True))
                if not self.judge(promised, loss - loss_at(), loss, prior):
                    self.put(start)
                    continue
            decays = [min(1.0, alpha * group["weight_decay"]) for (group, _), alpha in zip(places, alphas, strict=True)]
            self.put([a - decay * a + b for a, b, decay in zip(start, s, decays, strict=True)])
            return

    def put(self, points):
        for (group, i), x in zip(self.everything(), points, strict=True):
            group["x"][i] = x

    def judge(self, promised, actual, loss, prior):
        """Return whether the trial is kept; the radius moves either way."""
        if promised == 0:
            return True
        noise = 8 * np.finfo(float).eps * abs(loss) + abs(self.gap)
        wanted = 0.5 if self.phase == 2 else -1.0
        if not np.isfinite(actual) or promised - actual > (1 - wanted) * abs(promised) + noise:
            self.d *= 0.25 if self.phase == 2 else 0.5
            self.phase = 2 if self.phase == 2 else 0
            return False
        share = min(2.0, max(0.0, 1 - actual / promised)) if promised > noise else 0.0
        memory = 0.5 if self.phase else 0.8
        self.eaten = memory * self.eaten + (1 - memory) * share
        self.weight = memory * self.weight + (1 - memory)
        mean = self.eaten / self.weight  # 1 - rho
        too_large = mean > 1 - self.options["shrink_below"] and self.weight > 0.5
        small = mean < 1 - self.options["grow_above"]
        if self.phase:
            if too_large:
                self.d, self.phase = 0.4 * self.d, 0
            elif self.d >= prior and not small:
                self.phase = 0
            else:
                self.d, self.phase = 1.25 * self.d, 1
        elif too_large:
            self.d *= 0.85
        elif small:
            self.d *= 1.2
        elif self.d < prior:
            self.d = min(1.1 * self.d, prior)
        else:
            self.d = max(0.975 * self.d, prior)
        return True
