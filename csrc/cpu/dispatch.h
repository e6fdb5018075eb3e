// The instruction sets of the library, each with its tables.

#pragma once

#include "gather.h"
#include "matmul.h"
#include "sweeps.h"

namespace fastgrpo {

enum Isa : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon, kNeonBf16 };

// The tables of an instruction set; null when this library holds none or this CPU cannot run it.
const Sweeps* sweeps_for(Isa isa);
const Products* products_for(Isa isa);
const Gather* gather_for(Isa isa);

}  // namespace fastgrpo
