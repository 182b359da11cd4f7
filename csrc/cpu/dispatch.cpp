// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fedpai {

namespace scalar {
extern const KernelTable kTable;
}
#ifdef FEDPAI_HAVE_AVX2
namespace avx2 {
extern const KernelTable kTable;
}
#endif
#ifdef FEDPAI_HAVE_AVX512
namespace avx512 {
extern const KernelTable kTable;
}
#endif
#ifdef FEDPAI_HAVE_NEON
namespace neon {
extern const KernelTable kTable;
}
#endif

namespace {

struct Target {
  const KernelTable* table;
  bool present;
};

// Worst first. __builtin_cpu_supports asks both the CPU and, through XGETBV, the operating system.
const std::vector<Target>& targets() {
  static const std::vector<Target> list = [] {
    std::vector<Target> found;
    found.push_back({&scalar::kTable, true});
#ifdef FEDPAI_HAVE_AVX2
    found.push_back({&avx2::kTable, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                        __builtin_cpu_supports("bmi2")});
#endif
#ifdef FEDPAI_HAVE_AVX512
    found.push_back({&avx512::kTable, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
#ifdef FEDPAI_HAVE_NEON
    found.push_back({&neon::kTable, true});  // part of the AArch64 base architecture
#endif
    return found;
  }();
  return list;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const KernelTable* find(const std::string& name, const char* argument) {
  for (const Target& target : targets()) {
    if (name != target.table->isa) continue;
    if (target.present) return target.table;
    throw std::invalid_argument(std::string(argument) + ": this CPU lacks the instruction set '" + name +
                                "'; it has: " + join(available_isas()));
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + join(compiled_isas()) +
                              " (those compiled in), got '" + name + "'");
}

const KernelTable* default_table() {
  const char* forced = std::getenv("FEDPAI_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced, "FEDPAI_ISA");
  const KernelTable* best = nullptr;
  for (const Target& target : targets()) {
    if (target.present) best = target.table;
  }
  return best;
}

std::atomic<const KernelTable*> selected{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Target& target : targets()) names.emplace_back(target.table->isa);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Target& target : targets()) {
    if (target.present) names.emplace_back(target.table->isa);
  }
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = selected.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = default_table();  // two first callers find the same table
    selected.store(table, std::memory_order_release);
  }
  return *table;
}

void select_isa(const std::string& name) { selected.store(find(name, "isa"), std::memory_order_release); }

}  // namespace fedpai
