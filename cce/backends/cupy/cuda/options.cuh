// Options of a module: every name is a macro, set with -D by module.py, 0 where it is not given.
//
// Conventions of all kernels (docs/algorithm.md has the algorithm, cce/reference/tiled.py its plain text):
// - sizes N V D T, blocks BLOCK_N BLOCK_V; TILE_N TILE_V: what one product covers; a window's columns are V here.
// - exponentials are powers of two of differences: exp(z - m) = exp2(LOG2E (z - m)). The difference comes first, and no
//   multiply-add of LOG2E z with LOG2E m stands for it: both may be large, and only what they differ by counts.
// - a maximum is fmaxf's, which leaves NaN out; a sum of exponentials about it does not.
// - a row or an entry beyond the last is read as the last, so that no load needs a mask; what it gave is not stored.
#pragma once

#define BFLOAT16 0
#define FLOAT16 1
#define FLOAT32 2

// Products: the dtype of their factors; IEEE: float32 factors are not rounded to tf32.
#ifndef DTYPE
#define DTYPE BFLOAT16
#endif
#ifndef IEEE
#define IEEE 0
#endif
// A logit is z = softcap tanh(scale (x + bias) / softcap), without SOFTCAP scale (x + bias).
#ifndef BIAS
#define BIAS 0
#endif
#ifndef SCALE
#define SCALE 0
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif
// Statistics beside the log-sum-exp; gradients of the entropy and of the weighted logit.
#ifndef ENTROPY
#define ENTROPY 0
#endif
#ifndef WEIGHTED
#define WEIGHTED 0
#endif
#ifndef PREDICTION
#define PREDICTION 0
#endif
// MAPS: statistics of every BLOCK_V places are stored, too; TILE_ENTROPY: their entropy.
#ifndef MAPS
#define MAPS 0
#endif
#ifndef TILE_ENTROPY
#define TILE_ENTROPY 0
#endif
// A block's sums are taken about the running maximum; 0: about its own.
#ifndef ONLINE
#define ONLINE 0
#endif
// K > 1 targets a row.
#ifndef SEVERAL_TARGETS
#define SEVERAL_TARGETS 0
#endif
#ifndef DBIAS
#define DBIAS 0
#endif
#ifndef BLOCK_N
#define BLOCK_N 128
#endif
#ifndef BLOCK_V
#define BLOCK_V 128
#endif

typedef unsigned short half_word;  // 16 bits of a bfloat16 or a float16
#if DTYPE == FLOAT32
typedef float element;
#else
typedef half_word element;
#endif

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
#define INF __int_as_float(0x7f800000)
#define NEG_INF (-INF)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)
