# Fails if an object compiled for one instruction set defines a weak or unique symbol: the linker keeps one of
# several equal ones, and that one could hold instructions that an older CPU does not have.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} cannot read ${object}")
  endif()
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
  if(shared)
    message(FATAL_ERROR "${object} defines symbols that the linker may share between instruction sets: ${shared}")
  endif()
endforeach()
