# Sanitizers for `make sanitize` (SAFT_SANITIZE = address;undefined | thread): target saft_sanitizers holds their flags,
# SAFT_SANITIZE_SOURCES what such a library has beside the operations. Both are empty in a build for use.

set(SAFT_SANITIZE "" CACHE STRING "Sanitizers, for tests only: address;undefined or thread")
add_library(saft_sanitizers INTERFACE)
list(JOIN SAFT_SANITIZE "," sanitizers)

if(SAFT_SANITIZE)
  if(NOT sanitizers MATCHES "^(address,undefined|thread)$")
    message(FATAL_ERROR "SAFT_SANITIZE must be address;undefined or thread, not '${SAFT_SANITIZE}'.")
  endif()
  if(NOT SAFT_CUDA STREQUAL "OFF")
    message(FATAL_ERROR "SAFT_SANITIZE is for the kernels of the CPU alone. Set SAFT_CUDA=OFF.")
  endif()
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    message(FATAL_ERROR "SAFT_SANITIZE needs g++, but the compiler is ${CMAKE_CXX_COMPILER_ID}. Set CXX=g++.")
  endif()
  target_compile_options(saft_sanitizers INTERFACE
    -fsanitize=${sanitizers} -fno-sanitize-recover=all
    -O1 -g1 -fno-omit-frame-pointer  # reports name the line and its callers, and the checks compile in little time
    -Wno-psabi)                      # functions that are not inlined now hand vectors to each other, in one file
  # A vector's memory reaches beyond its elements; AddressSanitizer knows the memory only.
  target_compile_definitions(saft_sanitizers INTERFACE _GLIBCXX_ASSERTIONS)
  target_link_options(saft_sanitizers INTERFACE -fsanitize=${sanitizers})
  set(SAFT_SANITIZE_SOURCES tests/sanitized/unchecked.cpp)
  # Kernels throw nothing; cleaning up after the checks would add a symbol that check_isa_object.cmake refuses.
  set(SAFT_SANITIZE_KERNEL_FLAGS -fno-exceptions)
  if(sanitizers STREQUAL "thread")
    list(APPEND SAFT_SANITIZE_SOURCES tests/sanitized/threads.cpp)
    target_link_options(saft_sanitizers INTERFACE -Wl,--wrap=torch_parallel_for)
  endif()
endif()
