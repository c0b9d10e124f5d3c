// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/site_stats.h"

namespace quern {

// How far the off-diagonal of H is believed: rho = T / (T + kappa n); methods.md 2.2.5. A second
// moment of T rows has errors in every entry, and error feedback spends them as if they were real.
// Measured on activations of a trained model, error on unseen text at 4 bits with kappa 0, 2, 8:
// down_proj at T = 5 n .0300, .0240, .0219; q_proj at T = 16 n .0079, .0078, .0085; nothing
// changes by more than 1 % at T = 50 n.
constexpr double kDefaultKappa = 2.0;
constexpr double kSmallestKappa = 0.1;
constexpr double kLargestKappa = 8.0;

// kappa from how much H and H_holdout, two independent samples, disagree: the shrinkage that
// brings the off-diagonal correlations closest to the true ones in the mean square (Ledoit and
// Wolf 2004, with their variance estimated between texts instead of between rows, because rows of
// one text resemble each other), times a factor for the solvers, which are hurt less by what is
// overestimated than that norm says. Drawn towards kDefaultKappa, on a logarithmic scale, by as
// much as the held-out rows are few: a single text says little about how texts differ.
[[nodiscard]] double estimate_kappa(const SiteStats& stats);

}  // namespace quern
