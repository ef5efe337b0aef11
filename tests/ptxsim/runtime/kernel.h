// Included by every translated kernel.
#pragma once
#include "atomics.h"
#include "machine.h"
#include "math.h"
#include "memory.h"

#define KERNEL [[gnu::visibility("default")]]
