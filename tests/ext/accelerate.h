/* What ext/accelerate.c needs of Apple's library, for tests on other systems. */
static void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc) {
    (void)order, (void)trans_a, (void)trans_b; /* row by row, as they lie */
    for (int row = 0; row < m; row++)
        for (int column = 0; column < n; column++) {
            float sum = 0, *to = c + (long)row * ldc + column;
            for (int i = 0; i < k; i++) sum += a[(long)row * lda + i] * b[(long)i * ldb + column];
            *to = alpha * sum + (beta == 0 ? 0 : beta * *to);
        }
}
