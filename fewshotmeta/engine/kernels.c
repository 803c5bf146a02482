/* Fused kernels for channels-last images: (N, H, W, C) in memory, with C a multiple of L.
 *
 * The compiler is told the type: -DT=float -DI=int32_t or -DT=double -DI=int64_t. Compiled by
 * fewshotmeta/engine/kernels.py on first use; the page "Kernels" shows the parts, each of which
 * begins at a line of "==". A kernel is a function `int name(...)` at the beginning of a line:
 * it returns 0, or 1 where there was no memory for its scratch, and then it has written nothing.
 * Python reads the kernels' names and arguments from this file.
 *
 * Names: N images of H x W pixels and C (of a first layer D) channels, B vectors of channels at
 * once, K pixels of a pooling window (4, or 1 without a pool), S the stride of a convolution.
 */
/* == vectors == */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef long long Z;
/* A vector fills one register: gcc keeps longer ones in memory. The sums of 6 rows and COLUMNS
 * vectors of a matrix product fit into the registers: 32 of 64 bytes, 16 of 32, 32 of 16. */
#if defined __AVX512F__
enum { BYTES = 64, COLUMNS = 4 };
#elif defined __AVX__
enum { BYTES = 32, COLUMNS = 2 };
#elif defined __aarch64__
enum { BYTES = 16, COLUMNS = 4 };
#else
enum { BYTES = 16, COLUMNS = 2 };
#endif
enum { L = BYTES / sizeof(T) }; /* numbers in a vector */
typedef T V __attribute__((vector_size(BYTES)));
typedef I M __attribute__((vector_size(BYTES))); /* a mask, or small integers, for each number */
typedef uint8_t U __attribute__((vector_size(L)));

/* Short loops are unrolled whole, so that arrays of vectors live in registers. */
#define FOR(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < (n); i++)
#define FROM1(i, n) _Pragma("GCC unroll 32") for (int i = 1; i < (n); i++)
/* Functions that are told a constant (B, K, D) must be inlined, or it is none. */
#define inl static inline __attribute__((always_inline))

inl V ld(const T *p) {
    V v;
    memcpy(&v, p, BYTES);
    return v;
}

inl void st(T *p, V v) { memcpy(p, &v, BYTES); }
inl V all(T a) { return a - (V){0}; }
inl V sel(M m, V a, V b) { return (V)(((M)a & m) | ((M)b & ~m)); }

/* Small integers are kept in a byte each. */
inl M ldk(const uint8_t *p) {
    U u;
    memcpy(&u, p, L);
    return __builtin_convertvector(u, M);
}

inl void stk(uint8_t *p, M m) {
    U u = __builtin_convertvector(m, U);
    memcpy(p, &u, L);
}

/* Partial sums are added up as doubles. */
inl void flush(double *d, V v) {
    for (int l = 0; l < L; l++)
        d[l] += v[l];
}

/* The derivative of the activation: 1, or the leak where its input is not positive. */
inl V slope(V a, V leak) { return sel(a > 0, all(1), leak); }

/* Run f for groups of up to four vectors of channels. */
#define GROUPS(f, ...) \
    for (Z c = 0; c < C;) \
        switch ((C - c) / L) { \
        case 1: \
            f(1, c, __VA_ARGS__); \
            c += L; \
            break; \
        case 2: \
            f(2, c, __VA_ARGS__); \
            c += 2 * L; \
            break; \
        case 3: \
            f(3, c, __VA_ARGS__); \
            c += 3 * L; \
            break; \
        default: \
            f(4, c, __VA_ARGS__); \
            c += 4 * L; \
        }

/* == moments == */
/* Mean and biased variance of each channel, about the first pixel: sums of values that are far
 * from zero would cancel. s and q are the sums of the differences and of their squares. */
inl void moments_(const int B, Z c, const T *y, Z rows, Z C, double *s, double *q) {
    V k[4], a[4], b[4];
    FOR(v, B) {
        k[v] = ld(y + c + v * L);
        a[v] = b[v] = all(0);
    }
    for (Z r = 0; r < rows; r++) {
        FOR(v, B) {
            V d = ld(y + r * C + c + v * L) - k[v];
            a[v] += d;
            b[v] += d * d;
        }
        if (r % 512 == 511 || r == rows - 1)
            FOR(v, B) {
                flush(s + c + v * L, a[v]);
                flush(q + c + v * L, b[v]);
                a[v] = b[v] = all(0);
            }
    }
}

static void moments(const T *y, Z rows, Z C, double *s, double *q) {
    GROUPS(moments_, y, rows, C, s, q)
}

/* == norm_forward == */
/* z = act(max over the K pixels of a window of scale*y + shift); p is the chosen y, k which. */
inl void apply_(
    const int B, Z c, const int K, const T *y, Z N, Z H, Z W, Z C, const T *scale, const T *shift,
    T leak, T *z, T *p, uint8_t *k
) {
    const int s = K == 4 ? 2 : 1;
    Z h = H / s, w = W / s;
    V lk = all(leak), sc[4], sh[4];
    FOR(v, B) {
        sc[v] = ld(scale + c + v * L);
        sh[v] = ld(shift + c + v * L);
    }
    for (Z n = 0; n < N; n++)
        for (Z i = 0; i < h; i++)
            for (Z j = 0; j < w; j++)
                FOR(v, B) {
                    const T *at = y + ((n * H + i * s) * W + j * s) * C + c + v * L;
                    Z o = ((n * h + i) * w + j) * C + c + v * L;
                    V py = ld(at), a = py * sc[v] + sh[v];
                    M which = {0};
                    FROM1(t, K) {
                        V yt = ld(at + ((t >> 1) * W + (t & 1)) * C), b = yt * sc[v] + sh[v];
                        M m = b > a;
                        a = sel(m, b, a);
                        py = sel(m, yt, py);
                        which = (which & ~m) | (m & t);
                    }
                    st(z + o, a * slope(a, lk));
                    if (K == 4) {
                        st(p + o, py);
                        stk(k + o, which);
                    }
                }
}

/* aff: mean, 1/std, scale, shift, (4, C); fixed: mean 0 and 1/std 1, whatever y is */
int norm_forward(
    const T *y, Z N, Z H, Z W, Z C, Z pool, Z fixed, const T *gamma, const T *beta, double eps,
    double leak, T *z, T *p, uint8_t *k, T *aff
) {
    double *s = calloc(2 * C, sizeof(double)), *q = s + C;
    if (!s)
        return 1;
    Z m = N * H * W;
    if (!fixed)
        moments(y, m, C, s, q);
    for (Z c = 0; c < C; c++) {
        double d = s[c] / m;
        double mean = fixed ? 0 : d + y[c];
        double r = fixed ? 1 : 1 / sqrt(fmax(q[c] / m - d * d, 0) + eps);
        if (!(q[c] == q[c]))
            r = q[c]; /* fmax would hide what is not a number */
        aff[c] = mean;
        aff[C + c] = r;
        aff[2 * C + c] = gamma[c] * r;
        aff[3 * C + c] = beta[c] - mean * gamma[c] * r;
    }
    free(s);
    if (pool) {
        GROUPS(apply_, 4, y, N, H, W, C, aff + 2 * C, aff + 3 * C, leak, z, p, k);
    } else {
        GROUPS(apply_, 1, y, N, H, W, C, aff + 2 * C, aff + 3 * C, leak, z, p, k);
    }
    return 0;
}

/* == norm_backward == */
/* s1 and s2: the sums of g' and of g'*(p - mean), g' the gradient behind the activation. */
inl void sums_(
    const int B, Z c, const T *gz, const T *p, Z rows, Z C, const T *aff, T leak, double *s1,
    double *s2
) {
    V lk = all(leak), mean[4], sc[4], sh[4], a[4], b[4];
    FOR(v, B) {
        const T *f = aff + c + v * L;
        mean[v] = ld(f);
        sc[v] = ld(f + 2 * C);
        sh[v] = ld(f + 3 * C);
        a[v] = b[v] = all(0);
    }
    for (Z r = 0; r < rows; r++) {
        FOR(v, B) {
            Z o = r * C + c + v * L;
            V py = ld(p + o), g = ld(gz + o) * slope(py * sc[v] + sh[v], lk);
            a[v] += g;
            b[v] += g * (py - mean[v]);
        }
        if (r % 512 == 511 || r == rows - 1)
            FOR(v, B) {
                flush(s1 + c + v * L, a[v]);
                flush(s2 + c + v * L, b[v]);
                a[v] = b[v] = all(0);
            }
    }
}

/* gy = g'*scale at the chosen pixel + (A + D*y) everywhere, also where no window reaches. */
inl void spread_(
    const int B, Z c, const int K, const T *gz, const T *y, const T *p, const uint8_t *k, Z N,
    Z H, Z W, Z C, const T *aff, T leak, const T *A, const T *D, T *gy
) {
    const int s = K == 4 ? 2 : 1;
    Z h = H / s, w = W / s;
    V lk = all(leak), sc[4], sh[4], av[4], dv[4];
    FOR(v, B) {
        Z o = c + v * L;
        sc[v] = ld(aff + 2 * C + o);
        sh[v] = ld(aff + 3 * C + o);
        av[v] = ld(A + o);
        dv[v] = ld(D + o);
    }
    for (Z n = 0; n < N; n++) {
        for (Z i = 0; i < h; i++)
            for (Z j = 0; j < w; j++)
                FOR(v, B) {
                    Z at = ((n * H + i * s) * W + j * s) * C + c + v * L,
                      o = ((n * h + i) * w + j) * C + c + v * L;
                    V py = ld(p + o), g = ld(gz + o) * slope(py * sc[v] + sh[v], lk) * sc[v];
                    M which = {0};
                    if (K == 4)
                        which = ldk(k + o);
                    FOR(t, K) {
                        Z e = at + ((t >> 1) * W + (t & 1)) * C;
                        st(gy + e, av[v] + dv[v] * ld(y + e) + (V)((M)g & (which == t)));
                    }
                }
        for (Z i = 0; i < H; i++)
            for (Z j = i < h * s ? w * s : 0; j < W; j++)
                FOR(v, B) {
                    Z e = ((n * H + i) * W + j) * C + c + v * L;
                    st(gy + e, av[v] + dv[v] * ld(y + e));
                }
    }
}

/* sums: of g' and of g'*xhat, (2, C), which are the gradients of shift and scale.
 * Fixed statistics do not follow y: as if they were means over infinitely many pixels. */
int norm_backward(
    const T *gz, const T *y, const T *p, const uint8_t *k, Z N, Z H, Z W, Z C, Z pool, Z fixed,
    const T *aff, double leak, T *gy, T *sums
) {
    double *s1 = calloc(2 * C, sizeof(double)), *s2 = s1 + C;
    T *A = malloc(2 * C * sizeof(T)), *D = A + C;
    if (!s1 || !A) {
        free(s1);
        free(A);
        return 1;
    }
    double m = fixed ? INFINITY : N * H * W;
    Z rows = pool ? N * (H / 2) * (W / 2) : N * H * W;
    GROUPS(sums_, gz, p, rows, C, aff, leak, s1, s2)
    for (Z c = 0; c < C; c++) {
        double r = aff[C + c], g = aff[2 * C + c];
        s2[c] *= r;
        sums[c] = s1[c];
        sums[C + c] = s2[c];
        D[c] = -g * r * s2[c] / m;
        A[c] = -g * s1[c] / m - D[c] * aff[c];
    }
    if (pool) {
        GROUPS(spread_, 4, gz, y, p, k, N, H, W, C, aff, leak, A, D, gy);
    } else {
        GROUPS(spread_, 1, gz, y, p, k, N, H, W, C, aff, leak, A, D, gy);
    }
    free(s1);
    free(A);
    return 0;
}

/* == norm_twice == */
/* Sums of u, of u*(y - mean) and of g' times the u at the chosen pixel. */
inl void usums_(
    const int B, Z c, const int K, const T *u, const T *gz, const T *y, const T *p,
    const uint8_t *k, Z N, Z H, Z W, Z C, const T *aff, T leak, double *s1, double *s2, double *s3
) {
    const int s = K == 4 ? 2 : 1;
    Z h = H / s, w = W / s;
    V lk = all(leak), mean[4], sc[4], sh[4], a[4], b[4], d[4];
    FOR(v, B) {
        const T *f = aff + c + v * L;
        mean[v] = ld(f);
        sc[v] = ld(f + 2 * C);
        sh[v] = ld(f + 3 * C);
    }
    for (Z n = 0; n < N; n++) {
        FOR(v, B)
            a[v] = b[v] = d[v] = all(0);
        for (Z i = 0; i < h; i++)
            for (Z j = 0; j < w; j++)
                FOR(v, B) {
                    Z at = ((n * H + i * s) * W + j * s) * C + c + v * L,
                      o = ((n * h + i) * w + j) * C + c + v * L;
                    V py = ld(p + o), g = ld(gz + o) * slope(py * sc[v] + sh[v], lk),
                      chosen = all(0);
                    M which = {0};
                    if (K == 4)
                        which = ldk(k + o);
                    FOR(t, K) {
                        Z e = at + ((t >> 1) * W + (t & 1)) * C;
                        V ut = ld(u + e);
                        a[v] += ut;
                        b[v] += ut * (ld(y + e) - mean[v]);
                        chosen = sel(which == t, ut, chosen);
                    }
                    d[v] += chosen * g;
                }
        for (Z i = 0; i < H; i++)
            for (Z j = i < h * s ? w * s : 0; j < W; j++)
                FOR(v, B) {
                    Z e = ((n * H + i) * W + j) * C + c + v * L;
                    V ut = ld(u + e);
                    a[v] += ut;
                    b[v] += ut * (ld(y + e) - mean[v]);
                }
        FOR(v, B) {
            Z o = c + v * L;
            flush(s1 + o, a[v]);
            flush(s2 + o, b[v]);
            flush(s3 + o, d[v]);
        }
    }
}

/* to_y = E + F*y + G*u + P*g' at the chosen pixel;
 * to_gz = act'*(scale*(u at the chosen pixel) + Q + R*p). */
inl void twice_(
    const int B, Z c, const int K, const T *u, const T *gz, const T *y, const T *p,
    const uint8_t *k, Z N, Z H, Z W, Z C, const T *aff, T leak, const T *co, T *to_gz, T *to_y
) {
    const int s = K == 4 ? 2 : 1;
    Z h = H / s, w = W / s;
    V lk = all(leak), sc[4], sh[4], E[4], F[4], G[4], P[4], Q[4], R[4];
    FOR(v, B) {
        const T *f = aff + c + v * L, *x = co + c + v * L;
        sc[v] = ld(f + 2 * C);
        sh[v] = ld(f + 3 * C);
        E[v] = ld(x);
        F[v] = ld(x + C);
        G[v] = ld(x + 2 * C);
        P[v] = ld(x + 3 * C);
        Q[v] = ld(x + 4 * C);
        R[v] = ld(x + 5 * C);
    }
    for (Z n = 0; n < N; n++) {
        for (Z i = 0; i < h; i++)
            for (Z j = 0; j < w; j++)
                FOR(v, B) {
                    Z at = ((n * H + i * s) * W + j * s) * C + c + v * L,
                      o = ((n * h + i) * w + j) * C + c + v * L;
                    V py = ld(p + o), act = slope(py * sc[v] + sh[v], lk),
                      g = ld(gz + o) * act * P[v], chosen = all(0);
                    M which = {0};
                    if (K == 4)
                        which = ldk(k + o);
                    FOR(t, K) {
                        Z e = at + ((t >> 1) * W + (t & 1)) * C;
                        V ut = ld(u + e);
                        M m = which == t;
                        st(to_y + e, E[v] + F[v] * ld(y + e) + G[v] * ut + (V)((M)g & m));
                        chosen = sel(m, ut, chosen);
                    }
                    st(to_gz + o, act * (sc[v] * chosen + Q[v] + R[v] * py));
                }
        for (Z i = 0; i < H; i++)
            for (Z j = i < h * s ? w * s : 0; j < W; j++)
                FOR(v, B) {
                    Z e = ((n * H + i) * W + j) * C + c + v * L;
                    st(to_y + e, E[v] + F[v] * ld(y + e) + G[v] * ld(u + e));
                }
    }
}

/* From u on gy, v on the gradient of the scale and w on that of the shift. */
int norm_twice(
    const T *u, const T *v, const T *w, const T *gz, const T *y, const T *p, const uint8_t *k,
    Z N, Z H, Z W, Z C, Z pool, Z fixed, const T *gamma, const T *aff, const T *sums, double leak,
    T *to_gz, T *to_y, T *to_gamma
) {
    double *s = calloc(3 * C, sizeof(double));
    T *co = malloc(6 * C * sizeof(T));
    if (!s || !co) {
        free(s);
        free(co);
        return 1;
    }
    double m = fixed ? INFINITY : (double)N * H * W;
    if (pool) {
        GROUPS(usums_, 4, u, gz, y, p, k, N, H, W, C, aff, leak, s, s + C, s + 2 * C);
    } else {
        GROUPS(usums_, 1, u, gz, y, p, k, N, H, W, C, aff, leak, s, s + C, s + 2 * C);
    }
    for (Z c = 0; c < C; c++) {
        double mean = aff[c], r = aff[C + c], g = gamma[c];
        double a = sums[c] / m, b = sums[C + c] / m;
        double ubar = s[c] / m, pu = s[C + c] * r / m, vr = v[c] * r;
        double q = s[2 * C + c] / m - a * ubar - b * pu;
        double on_g = vr - g * r * r * pu;
        double on_u = -g * r * r * b;
        double on_x = -g * r * r * q - on_g * b - on_u * pu;
        to_gamma[c] = fixed ? r * s[2 * C + c] : m * r * q;
        co[c] = -on_x * r * mean - on_g * a - on_u * ubar;
        co[C + c] = on_x * r;
        co[2 * C + c] = on_u;
        co[3 * C + c] = on_g;
        co[5 * C + c] = vr - g * r * r * pu;
        co[4 * C + c] = w[c] - vr * mean - g * r * ubar + g * r * r * pu * mean;
    }
    if (pool) {
        GROUPS(twice_, 4, u, gz, y, p, k, N, H, W, C, aff, leak, co, to_gz, to_y);
    } else {
        GROUPS(twice_, 1, u, gz, y, p, k, N, H, W, C, aff, leak, co, to_gz, to_y);
    }
    free(s);
    free(co);
    return 0;
}

/* == patch_moments == */
/* The first layer: few input channels D, 3x3, padding 1, stride S; weights (9*D, C), their taps
 * in the order (row, column, channel). An image is copied into one with a border of zeros. */
static T *padded(Z H, Z W, Z D) { return calloc((H + 2) * (W + 2) * D, sizeof(T)); }
static void pad(T *q, const T *x, Z H, Z W, Z D) {
    for (Z i = 0; i < H; i++)
        memcpy(q + ((i + 1) * (W + 2) + 1) * D, x + i * W * D, W * D * sizeof(T));
}

/* Sums over all patches: of the taps, (9*D), and of their products, (9*D, 9*D), as doubles. The
 * taps of a row of patches lie side by side, so that a product of taps is one of vectors. */
int patch_moments(const T *x, Z N, Z H, Z W, Z D, Z S, double *sum, double *prod) {
    Z P = 9 * D, h = (H - 1) / S + 1, w = (W - 1) / S + 1, wl = (w + L - 1) / L * L;
    T *rows = calloc(P * wl, sizeof(T));
    T *q = padded(H, W, D);
    T *acc = calloc((P + P * P) * L, sizeof(T));
    if (!rows || !q || !acc) {
        free(rows);
        free(q);
        free(acc);
        return 1;
    }
    for (Z n = 0; n < N; n++) {
        pad(q, x + n * H * W * D, H, W, D);
        for (Z i = 0; i < h; i++) {
            for (Z t = 0; t < P; t++) {
                const T *from = q + ((i * S + t / D / 3) * (W + 2) + t / D % 3) * D + t % D;
                for (Z j = 0; j < w; j++)
                    rows[t * wl + j] = from[j * S * D];
            }
            for (Z a = 0; a < P; a++) {
                V s = ld(acc + a * L);
                for (Z j = 0; j < wl; j += L)
                    s += ld(rows + a * wl + j);
                st(acc + a * L, s);
                for (Z b = a; b < P; b++) {
                    T *to = acc + (P + a * P + b) * L;
                    V v = ld(to);
                    for (Z j = 0; j < wl; j += L)
                        v += ld(rows + a * wl + j) * ld(rows + b * wl + j);
                    st(to, v);
                }
            }
        }
        for (Z a = 0; a < P; a++) {
            FOR(l, L)
                sum[a] += acc[a * L + l];
            for (Z b = a; b < P; b++) {
                double v = 0;
                FOR(l, L)
                    v += acc[(P + a * P + b) * L + l];
                prod[a * P + b] += v;
            }
        }
        memset(acc, 0, (P + P * P) * L * sizeof(T));
    }
    for (Z a = 0; a < P; a++)
        for (Z b = 0; b < a; b++)
            prod[a * P + b] = prod[b * P + a];
    free(rows);
    free(q);
    free(acc);
    return 0;
}

/* == first_forward == */
/* The body, for each tap t of a patch; TAP is its value in the patch of the window's pixel e. */
#define TAPS(body) \
    FOR (dy, 3) \
        FOR (dx, 3) \
            FOR(d, D) { \
                const int t = (dy * 3 + dx) * D + d; \
                body \
            }
#define TAP at[((e >> 1) * S + dy) * ws + ((e & 1) * S + dx) * D + d]

/* z = act(max over the K pixels of a window of (w*patch + b)); k says which was chosen. */
inl int first_forward_(
    const int D, const int K, const T *x, Z N, Z H, Z W, Z C, Z S, const T *w, const T *b, T leak,
    T *z, uint8_t *k
) {
    const int s = K == 4 ? 2 : 1;
    Z ho = ((H - 1) / S + 1) / s, wo = ((W - 1) / S + 1) / s, ws = (W + 2) * D;
    V lk = all(leak);
    T *q = padded(H, W, D);
    if (!q)
        return 1;
    for (Z n = 0; n < N; n++) {
        pad(q, x + n * H * W * D, H, W, D);
        for (Z c = 0; c < C; c += L) {
            V wt[27], bias = ld(b + c);
            FOR(t, 9 * D)
                wt[t] = ld(w + t * C + c);
            for (Z i = 0; i < ho; i++)
                for (Z j = 0; j < wo; j++) {
                    const T *at = q + i * s * S * ws + j * s * S * D;
                    V a[4];
                    M which = {0};
                    FOR(e, K)
                        a[e] = bias;
                    TAPS(
                        FOR(e, K)
                            a[e] += wt[t] * TAP;
                    )
                    FROM1(e, K) {
                        M m = a[e] > a[0];
                        a[0] = sel(m, a[e], a[0]);
                        which = (which & ~m) | (m & e);
                    }
                    Z o = ((n * ho + i) * wo + j) * C + c;
                    st(z + o, a[0] * slope(a[0], lk));
                    if (K == 4)
                        stk(k + o, which);
                }
        }
    }
    free(q);
    return 0;
}

/* == first_weight == */
/* The gradients of w, (9*D, C), and of b, (C), as sums over the chosen patches. */
inl int first_weight_(
    const int D, const int K, const T *gz, const T *z, const uint8_t *k, const T *x, Z N, Z H,
    Z W, Z C, Z S, T leak, double *gw, double *gb
) {
    const int s = K == 4 ? 2 : 1;
    Z ho = ((H - 1) / S + 1) / s, wo = ((W - 1) / S + 1) / s, ws = (W + 2) * D;
    V lk = all(leak);
    T *q = padded(H, W, D);
    if (!q)
        return 1;
    for (Z n = 0; n < N; n++) {
        pad(q, x + n * H * W * D, H, W, D);
        for (Z c = 0; c < C; c += L) {
            V g[27], gs = all(0);
            FOR(t, 9 * D)
                g[t] = all(0);
            for (Z i = 0; i < ho; i++)
                for (Z j = 0; j < wo; j++) {
                    Z o = ((n * ho + i) * wo + j) * C + c;
                    const T *at = q + i * s * S * ws + j * s * S * D;
                    V v = ld(gz + o) * slope(ld(z + o), lk);
                    M which = {0};
                    if (K == 4)
                        which = ldk(k + o);
                    gs += v;
                    FOR(e, K) {
                        V ve = K == 4 ? (V)((M)v & (which == e)) : v;
                        TAPS(g[t] += ve * TAP;)
                    }
                }
            FOR(t, 9 * D)
                flush(gw + t * C + c, g[t]);
            flush(gb + c, gs);
        }
    }
    free(q);
    return 0;
}

/* == first_at == */
/* The adjoint: to = act'*(w*patch + b at the chosen pixel). */
inl int first_at_(
    const int D, const int K, const T *z, const uint8_t *k, const T *x, Z N, Z H, Z W, Z C, Z S,
    const T *w, const T *b, T leak, T *to
) {
    const int s = K == 4 ? 2 : 1;
    Z ho = ((H - 1) / S + 1) / s, wo = ((W - 1) / S + 1) / s, ws = (W + 2) * D;
    V lk = all(leak);
    T *q = padded(H, W, D);
    if (!q)
        return 1;
    for (Z n = 0; n < N; n++) {
        pad(q, x + n * H * W * D, H, W, D);
        for (Z c = 0; c < C; c += L) {
            V wt[27], bias = ld(b + c);
            FOR(t, 9 * D)
                wt[t] = ld(w + t * C + c);
            for (Z i = 0; i < ho; i++)
                for (Z j = 0; j < wo; j++) {
                    Z o = ((n * ho + i) * wo + j) * C + c;
                    const T *at = q + i * s * S * ws + j * s * S * D;
                    V a[4];
                    M which = {0};
                    if (K == 4)
                        which = ldk(k + o);
                    FOR(e, K)
                        a[e] = bias;
                    TAPS(
                        FOR(e, K)
                            a[e] += wt[t] * TAP;
                    )
                    FROM1(e, K)
                        a[0] = sel(which == e, a[e], a[0]);
                    st(to + o, a[0] * slope(ld(z + o), lk));
                }
        }
    }
    free(q);
    return 0;
}

/* == first layers, by channels and pool == */
/* Grey images or RGB, with a pool or without: each is compiled on its own. */
#define EITHER(f, ...) \
    { \
        if (D == 1) \
            return pool ? f(1, 4, __VA_ARGS__) : f(1, 1, __VA_ARGS__); \
        return pool ? f(3, 4, __VA_ARGS__) : f(3, 1, __VA_ARGS__); \
    }
int first_forward(
    const T *x, Z N, Z H, Z W, Z D, Z C, Z S, Z pool, const T *w, const T *b, double leak, T *z,
    uint8_t *k
) EITHER(first_forward_, x, N, H, W, C, S, w, b, leak, z, k)

int first_weight(
    const T *gz, const T *z, const uint8_t *k, const T *x, Z N, Z H, Z W, Z D, Z C, Z S, Z pool,
    double leak, double *gw, double *gb
) EITHER(first_weight_, gz, z, k, x, N, H, W, C, S, leak, gw, gb)

int first_at(
    const T *z, const uint8_t *k, const T *x, Z N, Z H, Z W, Z D, Z C, Z S, Z pool, const T *w,
    const T *b, double leak, T *to
) EITHER(first_at_, z, k, x, N, H, W, C, S, w, b, leak, to)

/* == product == */
/* Rows of a matrix product, c[r][.] (+)= sum over k of a[r*step + k*next]*b[k*ldb + .]: R rows
 * and B vectors, whose sums stay in registers. */
inl void dots_(
    const int R, const int B, const T *a, Z step, Z next, const T *b, Z ldb, Z K, T *c, Z ldc,
    const int add
) {
    V acc[6][4]; /* of constant size: gcc keeps an array of variable size in memory */
    FOR(r, R)
        FOR(v, B)
            acc[r][v] = add ? ld(c + r * ldc + v * L) : all(0);
    for (Z k = 0; k < K; k++) {
        V u[4];
        FOR(v, B)
            u[v] = ld(b + k * ldb + v * L);
        FOR(r, R) {
            T s = a[r * step + k * next];
            FOR(v, B)
                acc[r][v] += u[v] * s;
        }
    }
    FOR(r, R)
        FOR(v, B)
            st(c + r * ldc + v * L, acc[r][v]);
}
#define ROWS(B) \
    for (Z r = 0; r < M;) { \
        if (M - r >= 6) { \
            dots_(6, B, a + r * step, step, next, b + c0, ldb, K, c + r * ldc + c0, ldc, add); \
            r += 6; \
        } else if (M - r >= 4) { \
            dots_(4, B, a + r * step, step, next, b + c0, ldb, K, c + r * ldc + c0, ldc, add); \
            r += 4; \
        } else { \
            dots_(1, B, a + r * step, step, next, b + c0, ldb, K, c + r * ldc + c0, ldc, add); \
            r += 1; \
        } \
    }

/* The matrix product c (M, C) (+)= a (M, K; strides step, next) times b (K, C). */
static inline void product_(
    const int add, const T *a, Z step, Z next, const T *b, Z ldb, Z M, Z K, Z C, T *c, Z ldc
) {
    for (Z c0 = 0; c0 < C;)
        switch ((C - c0) / L < COLUMNS ? (C - c0) / L : COLUMNS) {
        case 1:
            ROWS(1)
            c0 += L;
            break;
        case 2:
            ROWS(2)
            c0 += 2 * L;
            break;
        case 3:
            ROWS(3)
            c0 += 3 * L;
            break;
        default:
            ROWS(4)
            c0 += 4 * L;
        }
}

/* == tiles == */
/* The 3x3 convolution, stride 1, padding 1, by Winograd's F(ExE, 3x3), E = 2 or 4: P*P products,
 * P = E + 2, for E*E outputs: 16 for 4 instead of 36, or 36 for 16 instead of 144. Each transform
 * is a matrix applied to the columns and to the rows. Here they are, for vectors at a distance s,
 * in place: r[0], r[s], ...; the points are 0, 1, -1 (2, -2 for E = 4) and infinity.
 * B', of a patch: */
inl void patch_(const int E, V *r, const int s) {
    V a = r[0], b = r[s], c = r[2 * s], d = r[3 * s];
    if (E == 2) {
        r[0] = a - c;
        r[s] = b + c;
        r[2 * s] = c - b;
        r[3 * s] = b - d;
        return;
    }
    V e = r[4 * s], f = r[5 * s], u = e - 4 * c, v = d - 4 * b, p = e - c, q = 2 * (d - b);
    r[0] = 4 * a - 5 * c + e;
    r[s] = u + v;
    r[2 * s] = u - v;
    r[3 * s] = p + q;
    r[4 * s] = p - q;
    r[5 * s] = 4 * b - 5 * d + f;
}

/* A', of products: E outputs. */
inl void outputs_(const int E, V *r, const int s) {
    V a = r[0], b = r[s], c = r[2 * s], d = r[3 * s], sum = b + c, difference = b - c;
    if (E == 2) {
        r[0] = a + sum;
        r[s] = difference - d;
        return;
    }
    V e = r[4 * s], f = r[5 * s], u = d + e, v = d - e;
    r[0] = a + sum + u;
    r[s] = difference + 2 * v;
    r[2 * s] = sum + 4 * u;
    r[3 * s] = difference + 8 * v + f;
}

/* A, the transpose of that, of gradients of the outputs. */
inl void gradients_(const int E, V *r, const int s) {
    V a = r[0], b = r[s];
    if (E == 2) {
        r[s] = a + b;
        r[2 * s] = a - b;
        r[3 * s] = -b;
        return;
    }
    V c = r[2 * s], d = r[3 * s], u = a + c, v = b + d, p = a + 4 * c, q = 2 * b + 8 * d;
    r[s] = u + v;
    r[2 * s] = u - v;
    r[3 * s] = p + q;
    r[4 * s] = p - q;
    r[5 * s] = d;
}

/* G, of three weights. */
inl void weights_(const int E, V *r, const int s) {
    V a = r[0], b = r[s], c = r[2 * s];
    if (E == 2) {
        V u = (a + c) * (T)0.5, v = b * (T)0.5;
        r[s] = u + v;
        r[2 * s] = u - v;
        r[3 * s] = c;
        return;
    }
    V u = (a + c) * (T)(-1. / 6), v = b * (T)(1. / 6), p = a * (T)(1. / 24) + c * (T)(1. / 6),
      q = b * (T)(1. / 12);
    r[0] = a * (T)0.25;
    r[s] = u - v;
    r[2 * s] = u + v;
    r[3 * s] = p + q;
    r[4 * s] = p - q;
    r[5 * s] = c;
}

/* G', the transpose of that: the gradients of three weights. */
inl void weight_gradients_(const int E, V *r, const int s) {
    V a = r[0], b = r[s], c = r[2 * s], d = r[3 * s], sum = b + c, difference = b - c;
    if (E == 2) {
        r[0] = a + sum * (T)0.5;
        r[s] = difference * (T)0.5;
        r[2 * s] = sum * (T)0.5 + d;
        return;
    }
    V e = r[4 * s], f = r[5 * s], u = sum * (T)(1. / 6);
    r[0] = a * (T)0.25 - u + (d + e) * (T)(1. / 24);
    r[s] = (d - e) * (T)(1. / 12) - difference * (T)(1. / 6);
    r[2 * s] = (d + e) * (T)(1. / 6) - u + f;
}

/* Where the n*n pixels from (i, j) on lie in an image; those outside of it: at zero. */
inl void pixels(const int n, T *x, Z H, Z W, Z C, Z i, Z j, T *zero, T **at) {
    FOR(a, n)
        FOR(b, n) {
            Z p = i + a, q = j + b;
            at[a * n + b] = p >= 0 && p < H && q >= 0 && q < W ? x + (p * W + q) * C : zero;
        }
}

/* Patches of P*P pixels, transformed, to v[e*lde], e = 0 ... P*P - 1. */
inl void to_patch(const int E, T **at, Z c, T *v, Z lde) {
    const int P = E + 2;
    V d[36];
    FOR(a, P) {
        FOR(b, P)
            d[a * P + b] = ld(at[a * P + b] + c);
        patch_(E, d + a * P, 1);
    }
    FOR(b, P)
        patch_(E, d + b, P);
    FOR(e, P * P)
        st(v + e * lde, d[e]);
}

/* The E*E outputs from the products m[e*lde]. */
inl void from_products(const int E, const T *m, Z lde, T **at, Z c) {
    const int P = E + 2;
    V d[36];
    FOR(b, P) {
        FOR(a, P)
            d[a * P + b] = ld(m + (a * P + b) * lde);
        outputs_(E, d + b, P);
    }
    FOR(a, E) {
        outputs_(E, d + a * P, 1);
        FOR(b, E)
            st(at[a * E + b] + c, d[a * P + b]);
    }
}

/* The transpose of that, for the gradient of the weights, from the E*E gradients. */
inl void to_products(const int E, T **at, Z c, T *m, Z lde) {
    const int P = E + 2;
    V d[36];
    FOR(a, E) {
        FOR(b, E)
            d[a * P + b] = ld(at[a * E + b] + c);
        gradients_(E, d + a * P, 1);
    }
    FOR(b, P)
        gradients_(E, d + b, P);
    FOR(e, P * P)
        st(m + e * lde, d[e]);
}

/* == scratch == */
/* Tiles at a time: what they touch stays in the second-level cache. */
#define TILES(E) ((E) == 2 ? 48 : 18)

/* P*P parts each of transformed weights U, patches v and products m; a pixel of zeros, and one
 * that is written and not read. A part is followed by a vector of nothing, since distances that
 * are a multiple of 4 KB would share cache sets. */
typedef struct {
    Z su, sv, sm; /* from one part to the next */
    T *U, *v, *m, *zero, *waste;
} Scratch;

static T *aligned(Z n) { return aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64); }

static void release(Scratch *s) {
    free(s->U);
    free(s->v);
    free(s->m);
    free(s->zero);
    free(s->waste);
}

static int reserve(Scratch *s, int E, Z C, Z O) {
    Z parts = (E + 2) * (E + 2);
    s->su = C * O + L;
    s->sv = TILES(E) * C + L;
    s->sm = TILES(E) * O + L;
    s->U = aligned(parts * s->su);
    s->v = aligned(parts * s->sv);
    s->m = aligned(parts * s->sm);
    s->zero = aligned(C > O ? C : O);
    s->waste = aligned(O);
    if (!s->U || !s->v || !s->m || !s->zero || !s->waste) {
        release(s);
        return 1;
    }
    memset(s->zero, 0, (C > O ? C : O) * sizeof(T));
    return 0;
}

/* Where tile k is: its image, the row i and the column j of its first output. */
#define PLACE(k, image, i, j) \
    const Z image = (k) / (th * tw), i = (k) / tw % th * E, j = (k) % tw * E

/* Ask for a part of the images that the next tiles read or write, since the memory is slow and
 * what comes next is known: images of `size` numbers with `tiles` tiles each, `all` tiles. */
inl void ahead(const T *x, Z size, Z tiles, Z first, Z n, Z all, int part, int parts) {
    Z begin = first * size / tiles, end = (first + n < all ? first + n : all) * size / tiles;
    if (begin >= end)
        return;
    Z from = begin + (end - begin) * part / parts, to = begin + (end - begin) * (part + 1) / parts;
    for (Z p = from; p < to; p += L)
        __builtin_prefetch(x + p, 0, 2);
}

/* == wino_forward == */
inl int wino_forward_(
    const int E, const T *x, Z N, Z H, Z W, Z C, Z O, const T *w, Z tap, Z in, Z flip, T *y
) {
    const int P = E + 2;
    Z th = (H + E - 1) / E, tw = (W + E - 1) / E, all_tiles = N * th * tw;
    Scratch scratch;
    if (reserve(&scratch, E, C, O))
        return 1;
    const Z su = scratch.su, sv = scratch.sv, sm = scratch.sm;
    T *U = scratch.U, *v = scratch.v, *m = scratch.m, *zero = scratch.zero, *at[36];
    for (Z c = 0; c < C; c++)
        for (Z o = 0; o < O; o += L) {
            V d[36];
            FOR(a, 3)
                FOR(b, 3)
                    d[a * P + b] = ld(w + (flip ? 8 - a * 3 - b : a * 3 + b) * tap + c * in + o);
            FOR(a, 3)
                weights_(E, d + a * P, 1);
            FOR(b, P)
                weights_(E, d + b, P);
            FOR(e, P * P)
                st(U + e * su + c * O + o, d[e]);
        }
    for (Z t0 = 0; t0 < all_tiles; t0 += TILES(E)) {
        Z n = all_tiles - t0 < TILES(E) ? all_tiles - t0 : TILES(E);
        for (Z t = 0; t < n; t++) {
            PLACE(t0 + t, image, i, j);
            pixels(P, (T *)x + image * H * W * C, H, W, C, i - 1, j - 1, zero, at);
            for (Z c = 0; c < C; c += L)
                to_patch(E, at, c, v + t * C + c, sv);
        }
        for (int e = 0; e < P * P; e++) {
            product_(0, v + e * sv, C, 1, U + e * su, O, n, C, O, m + e * sm, O);
            ahead(x, H * W * C, th * tw, t0 + n, n, all_tiles, e, P * P);
            ahead(y, H * W * O, th * tw, t0, n, all_tiles, e, P * P);
        }
        for (Z t = 0; t < n; t++) {
            PLACE(t0 + t, image, i, j);
            pixels(E, y + image * H * W * O, H, W, O, i, j, scratch.waste, at);
            for (Z o = 0; o < O; o += L)
                from_products(E, m + t * O + o, sm, at, o);
        }
    }
    release(&scratch);
    return 0;
}

/* y (N, H, W, O) = x (N, H, W, C) * w by tiles of E*E outputs; w (9, C, O), strides tap, in and 1;
 * flip: the taps in reverse order, as the gradient of the input needs them. */
int wino_forward(
    const T *x, Z N, Z H, Z W, Z C, Z O, const T *w, Z tap, Z in, Z flip, Z E, T *y
) {
    return E == 4 ? wino_forward_(4, x, N, H, W, C, O, w, tap, in, flip, y)
                  : wino_forward_(2, x, N, H, W, C, O, w, tap, in, flip, y);
}

/* == wino_weight == */
inl int wino_weight_(const int E, const T *x, const T *gy, Z N, Z H, Z W, Z C, Z O, T *gw) {
    const int P = E + 2;
    Z th = (H + E - 1) / E, tw = (W + E - 1) / E, all_tiles = N * th * tw;
    Scratch scratch;
    if (reserve(&scratch, E, C, O))
        return 1;
    const Z su = scratch.su, sv = scratch.sv, sm = scratch.sm;
    T *U = scratch.U, *v = scratch.v, *m = scratch.m, *zero = scratch.zero, *at[36];
    memset(U, 0, P * P * su * sizeof(T));
    for (Z t0 = 0; t0 < all_tiles; t0 += TILES(E)) {
        Z n = all_tiles - t0 < TILES(E) ? all_tiles - t0 : TILES(E);
        for (Z t = 0; t < n; t++) {
            PLACE(t0 + t, image, i, j);
            pixels(P, (T *)x + image * H * W * C, H, W, C, i - 1, j - 1, zero, at);
            for (Z c = 0; c < C; c += L)
                to_patch(E, at, c, v + t * C + c, sv);
            pixels(E, (T *)gy + image * H * W * O, H, W, O, i, j, zero, at);
            for (Z o = 0; o < O; o += L)
                to_products(E, at, o, m + t * O + o, sm);
        }
        for (int e = 0; e < P * P; e++) {
            product_(1, m + e * sm, 1, O, v + e * sv, C, O, n, C, U + e * su, C);
            ahead(x, H * W * C, th * tw, t0 + n, n, all_tiles, e, P * P);
            ahead(gy, H * W * O, th * tw, t0 + n, n, all_tiles, e, P * P);
        }
    }
    for (Z o = 0; o < O; o++)
        for (Z c = 0; c < C; c += L) {
            V d[36];
            FOR(e, P * P)
                d[e] = ld(U + e * su + o * C + c);
            FOR(b, P)
                weight_gradients_(E, d + b, P);
            FOR(a, 3)
                weight_gradients_(E, d + a * P, 1);
            FOR(a, 3)
                FOR(b, 3)
                    st(gw + (o * 9 + a * 3 + b) * C + c, d[a * P + b]);
        }
    release(&scratch);
    return 0;
}

/* gw (O, 3, 3, C): the gradient of the weights from gy (N, H, W, O), by tiles of E*E outputs. */
int wino_weight(const T *x, const T *gy, Z N, Z H, Z W, Z C, Z O, Z E, T *gw) {
    return E == 4 ? wino_weight_(4, x, gy, N, H, W, C, O, gw)
                  : wino_weight_(2, x, gy, N, H, W, C, O, gw);
}
