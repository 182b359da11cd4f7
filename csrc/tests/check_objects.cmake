# SPDX-License-Identifier: Apache-2.0
# Fails if one of OBJECTS defines a symbol that another object could end up using, or that runs at load:
# weak (W, V) and unique (u) symbols, and static constructors (_GLOBAL__sub_I_*).
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* ([WVu] [^\n]*|[tT] _GLOBAL__sub_I_[^\n]*)" found "${symbols}")
  if(found)
    list(JOIN found "\n  " found)
    message(FATAL_ERROR "${object} defines symbols that code for other CPUs could run:\n  ${found}")
  endif()
endforeach()
