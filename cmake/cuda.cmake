# Decides whether CUDA kernels are built (SAFT_CUDA = AUTO | ON | OFF) and says so in SAFT_CUDA_STATUS.
# nvcc may be a wrapper script, so the toolkit is asked for its root instead of guessing from the path.

if(NOT SAFT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SAFT_CUDA must be AUTO, ON or OFF, not '${SAFT_CUDA}'.")
endif()

unset(SAFT_NVCC CACHE)  # it may have come or gone since the last configuration
find_program(SAFT_NVCC nvcc NO_CMAKE_SYSTEM_PATH)  # PATH only, as the messages say
if(SAFT_CUDA STREQUAL "OFF")
  set(SAFT_CUDA_STATUS "off (SAFT_CUDA=OFF)")
elseif(NOT SAFT_NVCC)
  if(SAFT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SAFT_CUDA=ON, but nvcc is not on PATH. Install the CUDA toolkit, or set SAFT_CUDA=AUTO.")
  endif()
  set(SAFT_CUDA_STATUS "off (nvcc not found)")
else()
  execute_process(COMMAND ${SAFT_NVCC} --dryrun -x cu /dev/null OUTPUT_VARIABLE dryrun ERROR_VARIABLE dryrun)
  string(REGEX MATCH "TOP=([^\n]*)" found "${dryrun}")
  if(NOT found)
    message(FATAL_ERROR "nvcc (${SAFT_NVCC}) does not name its toolkit's root. Set SAFT_CUDA=OFF to build without CUDA.")
  endif()
  get_filename_component(SAFT_CUDA_ROOT "${CMAKE_MATCH_1}" REALPATH)
  set(CMAKE_CUDA_COMPILER "${SAFT_CUDA_ROOT}/bin/nvcc")
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)

  # Machine code for every GPU that a user may have, and PTX of the newest for those to come. A user who builds for one
  # machine may give less, in any order. CMake must be told in any case: without a GPU it would guess.
  set(SAFT_CUDA_ARCHITECTURES "80;86;89;90;100;120" CACHE STRING "Compute capabilities to compile for")
  set(architectures ${SAFT_CUDA_ARCHITECTURES})
  list(REMOVE_DUPLICATES architectures)
  list(SORT architectures COMPARE NATURAL)
  set(CMAKE_CUDA_ARCHITECTURES "")
  set(names "")
  foreach(architecture IN LISTS architectures)
    if(known MATCHES "compute_${architecture}\n")
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${architecture}-real")
      list(APPEND names "sm_${architecture}")
      set(newest "${architecture}")
    endif()
  endforeach()
  if(NOT names)
    message(FATAL_ERROR "nvcc (${SAFT_NVCC}) knows none of the architectures ${SAFT_CUDA_ARCHITECTURES}. "
                        "Set SAFT_CUDA_ARCHITECTURES to some of: ${known}")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)  # kernel parameters of more than 4 KiB
    message(FATAL_ERROR "CUDA 12.1 or later is needed, nvcc (${SAFT_NVCC}) is ${CMAKE_CUDA_COMPILER_VERSION}. "
                        "Set SAFT_CUDA=OFF to build without CUDA.")
  endif()
  set(SAFT_CUDA_BUILT ON)
  list(JOIN names " " names)
  set(SAFT_CUDA_STATUS "${CMAKE_CUDA_COMPILER_VERSION}: ${names}, PTX of compute_${newest}")
endif()
message(STATUS "CUDA kernels: ${SAFT_CUDA_STATUS}")
