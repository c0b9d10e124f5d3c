// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "nn/token_positions.h"

#include <cstdint>
#include <vector>

namespace quern {

// One value head's part of a sequence, in order of tokens; queries and keys are normalised, queries
// scaled.
struct DeltaHead {
  std::vector<float> queries;  // [rows, key_dim]
  std::vector<float> keys;  // [rows, key_dim]
  std::vector<float> values;  // [rows, value_dim]
  std::vector<float> strengths;  // [rows] beta
  std::vector<float> log_decays;  // [rows] g <= 0
  std::int64_t rows = 0;
  std::int64_t key_dim = 0;
  std::int64_t value_dim = 0;
};

// What brings DeltaNet back to any of the tokens that it took last: a state cannot be cut off like
// keys and values, and one for each token would be large.
struct DeltaJournal {
  std::vector<float> state;  // before those tokens
  std::vector<float> inputs;  // of the convolution [kernel - 1 + rows, channels]
  std::vector<DeltaHead> heads;  // [value heads]
};

// What one layer keeps of the tokens seen so far.
struct LayerCache {
  std::vector<float> keys;  // [tokens, kv_heads * head_dim], after norm and rotation
  std::vector<float> values;  // [tokens, kv_heads * head_dim]
  // Of DeltaNet: the last inputs of the convolution [kernel - 1, channels], and the state
  // [value heads, key dim, value dim].
  std::vector<float> convolved;
  std::vector<float> state;
  bool keeps_journal = false;
  DeltaJournal journal;  // of the last tokens, when it is kept
  // Positions at which an expert was left out that is about as likely as the last that was taken.
  std::vector<std::int64_t> router_ties;
  std::int64_t tokens = 0;
  const TokenPositions* positions = nullptr;  // null: token n stands at n

  void clear() {
    keys.clear();
    values.clear();
    convolved.clear();
    state.clear();
    journal = {};
    router_ties.clear();
    tokens = 0;
  }
};

}  // namespace quern
