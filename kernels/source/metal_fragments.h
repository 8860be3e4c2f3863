// Products of small matrices by matrix units, in Metal's words (8 x 8, float). cuda_fragments.h says
// the same in CUDA's, and what a fragment is.

namespace quire {

FUNC int fragment_row(int lane) { return lane / 16 * 4 + lane / 2 % 4; }
FUNC int fragment_place(int lane) { return lane / 8 % 2 * 2 + lane % 2; }

FUNC void multiply_8x8(THREAD float* sums, float a0, float a1, float b0, float b1) {
  metal::simdgroup_matrix<float, 8, 8> a, b, c;
  a.thread_elements()[0] = a0;
  a.thread_elements()[1] = a1;
  b.thread_elements()[0] = b0;
  b.thread_elements()[1] = b1;
  c.thread_elements()[0] = sums[0];
  c.thread_elements()[1] = sums[1];
  metal::simdgroup_multiply_accumulate(c, a, b, c);
  sums[0] = c.thread_elements()[0];
  sums[1] = c.thread_elements()[1];
}

} // namespace quire
