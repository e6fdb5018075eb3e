// csrc/cpu/dispatch.cpp of a library whose only instruction set is AMX, emulated on the portable layer.

#include "dispatch.h"

#include <string.h>

#include "api.h"

namespace fastgrpo {

const Sweeps* sweeps_for(Isa) { return portable::kSweeps; }
const Gather* gather_for(Isa) { return &portable::kGather; }
const Products* products_for(Isa) { return &amx::kProducts; }

}  // namespace fastgrpo

int32_t fastgrpo_cpu_isa(const char* name) { return *name == '\0' || strcmp(name, "amx") == 0 ? fastgrpo::kAmx : -1; }
const char* fastgrpo_cpu_isa_names(void) { return "amx"; }
