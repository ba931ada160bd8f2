// The instruction sets (ISAs) that CPU kernels are compiled for, by name.
#pragma once

#include <string>
#include <vector>

namespace asvit_fast {

// Names as in the environment variable ASVIT_FAST_ISA, which sets the first choice.
std::vector<std::string> compiled_isas();   // in this build
std::vector<std::string> available_isas();  // that this CPU can run, best first
std::string get_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument

}  // namespace asvit_fast
