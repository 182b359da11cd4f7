// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "check.h"
#include "cpu/dispatch.h"

using namespace fedpai;

namespace {

std::string message_of_select(const std::string& name) {
  try {
    select_isa(name);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

}  // namespace

FEDPAI_SUITE(dispatch) {
  const std::string chosen = kernels().isa;

  tests::begin_case("scalar is everywhere, and first");
  CHECK(available_isas().front() == "scalar", "got " + available_isas().front());
  CHECK(compiled_isas().front() == "scalar", "got " + compiled_isas().front());

  tests::begin_case("each one present can be chosen and is then used");
  for (const std::string& isa : available_isas()) {
    select_isa(isa);
    CHECK(kernels().isa == isa, isa + " was asked for, " + kernels().isa + " is in use");
  }
  select_isa(chosen);

  tests::begin_case("an unknown one is refused, by name, and changes nothing");
  CHECK(message_of_select("avx1024").find("avx1024") != std::string::npos, message_of_select("avx1024"));
  CHECK(kernels().isa == chosen, std::string("now ") + kernels().isa);

  tests::begin_case("lanes are a power of two");
  for (const int lanes : {conv2d_kernels<float>().lanes, conv2d_kernels<double>().lanes}) {
    CHECK(lanes >= 1 && (lanes & (lanes - 1)) == 0, std::to_string(lanes));
  }
}
