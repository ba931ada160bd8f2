#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/for_each_isa.h"

namespace asvit_fast {
namespace {

struct Entry {
  const char* name;
  Isa isa;
  bool runs;
};

// Best first.
std::vector<Entry> entries() {
  std::vector<Entry> list;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  list.push_back({"avx512bf16", Isa::avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
  list.push_back({"avx512", Isa::avx512, avx512});
  list.push_back({"avx2", Isa::avx2, avx2});
#endif
  list.push_back({"portable", Isa::portable, true});
  return list;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa find(const std::string& name) {
  for (const Entry& entry : entries())
    if (entry.name == name && entry.runs) return entry.isa;
  throw std::invalid_argument("instruction set '" + name + "' cannot run here: use one of " + join(available_isas()));
}

Isa first_choice() {
  const char* wanted = std::getenv("ASVIT_FAST_ISA");
  return find(wanted && *wanted ? wanted : available_isas().front());
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{first_choice()};
  return isa;
}

}  // namespace

bool runs(Isa isa) {
  for (const Entry& entry : entries())
    if (entry.isa == isa) return entry.runs;
  return false;
}

Isa active_isa() { return current().load(std::memory_order_relaxed); }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) names.emplace_back(entry.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : entries())
    if (entry.runs) names.emplace_back(entry.name);
  return names;
}

std::string get_isa() {
  for (const Entry& entry : entries())
    if (entry.isa == active_isa()) return entry.name;
  return "portable";
}

void set_isa(const std::string& name) { current().store(find(name)); }

}  // namespace asvit_fast
