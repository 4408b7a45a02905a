// What loops in C++ share.
#pragma once

// Calls work(0) to work(count - 1) on PyTorch's threads: others would have to fight those, which wait busily.
template <class Work>
void spread(long count, long threads, Work work) {
    if (threads < 2)
        for (long i = 0; i < count; ++i) work(i);
    else
#pragma omp parallel for num_threads(threads)
        for (long i = 0; i < count; ++i) work(i);
}
