// What a C function of an op needs: its checks, the level in use, its scratch. For dispatch.cpp alone, which
// includes every op.
#pragma once
#include "checks.h"
#include "levels.h"
#include "scratch.h"
