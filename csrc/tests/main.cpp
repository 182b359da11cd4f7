// SPDX-License-Identifier: Apache-2.0
// Runs the suites: kernel_tests [--suite NAME] [--isa NAME]. Exit status: 0 passed, 1 failed, 2 bad arguments, 77 the
// instruction set is not present here (ctest reports the test as skipped).
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"
#include "cpu/dispatch.h"

namespace fedpai::tests {
namespace {

std::string current_case;
std::int64_t checks = 0;
std::int64_t failures = 0;
constexpr std::int64_t kMaxReported = 20;

bool contains(const std::vector<std::string>& names, const std::string& name) {
  for (const std::string& candidate : names) {
    if (candidate == name) return true;
  }
  return false;
}

}  // namespace

std::vector<Suite>& suites() {
  static std::vector<Suite> list;
  return list;
}

void begin_case(const std::string& name) { current_case = name; }
void count_check() { ++checks; }
void fail(const char* file, int line, const std::string& message) {
  ++failures;
  if (failures > kMaxReported) return;
  std::fprintf(stderr, "%s:%d: [%s] %s\n", file, line, current_case.c_str(), message.c_str());
}

// Runs one suite on one instruction set; false when anything in it failed.
static bool run(const Suite& suite, const std::string& isa) {
  checks = failures = 0;
  select_isa(isa);
  try {
    suite.body();
  } catch (const std::exception& error) {
    fail(__FILE__, __LINE__, std::string("unexpected exception: ") + error.what());
  }
  if (checks == 0) fail(__FILE__, __LINE__, "the suite checked nothing");
  std::printf("%-10s %-8s %lld checks, %lld failed\n", suite.name, isa.c_str(), static_cast<long long>(checks),
              static_cast<long long>(failures));
  return failures == 0;
}

}  // namespace fedpai::tests

int main(int argc, char** argv) {
  using namespace fedpai;
  using namespace fedpai::tests;
  std::string wanted_suite, wanted_isa;
  for (int i = 1; i < argc; i += 2) {
    const bool has_value = i + 1 < argc;
    if (has_value && std::strcmp(argv[i], "--suite") == 0) {
      wanted_suite = argv[i + 1];
    } else if (has_value && std::strcmp(argv[i], "--isa") == 0) {
      wanted_isa = argv[i + 1];
    } else {
      std::fprintf(stderr, "usage: kernel_tests [--suite NAME] [--isa NAME]\n");
      return 2;
    }
  }
  if (!wanted_isa.empty() && !contains(available_isas(), wanted_isa)) {
    std::printf("skipped: this machine has no %s\n", wanted_isa.c_str());
    return 77;
  }

  bool passed = true;
  int runs = 0;
  for (const Suite& suite : suites()) {
    if (!wanted_suite.empty() && wanted_suite != suite.name) continue;
    for (const std::string& isa : available_isas()) {
      if (!wanted_isa.empty() && wanted_isa != isa) continue;
      passed = run(suite, isa) && passed;
      ++runs;
    }
  }
  if (runs == 0) {
    std::fprintf(stderr, "no suite is called '%s'\n", wanted_suite.c_str());
    return 2;
  }
  return passed ? 0 : 1;
}
