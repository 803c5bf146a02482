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
enum { L = 64 / sizeof(T) }; /* numbers in a vector of 64 bytes, a cache line */
typedef T V __attribute__((vector_size(64)));
typedef I M __attribute__((vector_size(64))); /* a mask, or small integers, for each number */
typedef uint8_t U __attribute__((vector_size(64 / sizeof(T))));

/* Short loops are unrolled whole, so that arrays of vectors live in registers. */
#define FOR(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < (n); i++)
#define FROM1(i, n) _Pragma("GCC unroll 32") for (int i = 1; i < (n); i++)
/* Functions that are told a constant (B, K, D) must be inlined, or it is none. */
#define inl static inline __attribute__((always_inline))

inl V ld(const T *p) {
    V v;
    memcpy(&v, p, 64);
    return v;
}

inl void st(T *p, V v) { memcpy(p, &v, 64); }
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
        switch ((C - c0) / L) {
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
/* The 3x3 convolution, stride 1, padding 1, by Winograd's F(2x2, 3x3): 16 products for 4 outputs
 * instead of 36. v[e*lde], e = 0 ... 15: the 4x4 patch d at (i, j), transformed: B' d B. */
inl void to_patch(const T *x, Z H, Z W, Z C, Z i, Z j, Z c, const T *zero, T *v, Z lde) {
    V d[16];
    FOR(a, 4)
        FOR(b, 4) {
            Z p = i + a - 1, q = j + b - 1;
            d[a * 4 + b] =
                ld(p >= 0 && p < H && q >= 0 && q < W ? x + (p * W + q) * C + c : zero);
        }
    FOR(a, 4) {
        V *r = d + a * 4, r0 = r[0] - r[2], r1 = r[1] + r[2], r2 = r[2] - r[1], r3 = r[1] - r[3];
        r[0] = r0;
        r[1] = r1;
        r[2] = r2;
        r[3] = r3;
    }
    FOR(b, 4) {
        V *r = d + b;
        st(v + b * lde, r[0] - r[8]);
        st(v + (4 + b) * lde, r[4] + r[8]);
        st(v + (8 + b) * lde, r[8] - r[4]);
        st(v + (12 + b) * lde, r[4] - r[12]);
    }
}

/* The 2x2 outputs at (i, j) from m[e*lde]: A' m A. */
inl void from_products(const T *m, Z lde, T *y, Z H, Z W, Z C, Z i, Z j, Z c) {
    V s[2][4];
    FOR(b, 4) {
        V m0 = ld(m + b * lde), m1 = ld(m + (4 + b) * lde), m2 = ld(m + (8 + b) * lde),
          m3 = ld(m + (12 + b) * lde);
        s[0][b] = m0 + m1 + m2;
        s[1][b] = m1 - m2 - m3;
    }
    FOR(a, 2)
        if (i + a < H) {
            T *to = y + ((i + a) * W + j) * C + c;
            st(to, s[a][0] + s[a][1] + s[a][2]);
            if (j + 1 < W)
                st(to + C, s[a][1] - s[a][2] - s[a][3]);
        }
}

/* The transpose of that, for the gradient of the weights: A g A' of the 2x2 gradients at (i, j). */
inl void to_products(const T *g, Z H, Z W, Z C, Z i, Z j, Z c, const T *zero, T *m, Z lde) {
    V t[4][2];
    FOR(b, 2) {
        V g0 = ld(j + b < W ? g + (i * W + j + b) * C + c : zero),
          g1 = ld(i + 1 < H && j + b < W ? g + ((i + 1) * W + j + b) * C + c : zero);
        t[0][b] = g0;
        t[1][b] = g0 + g1;
        t[2][b] = g0 - g1;
        t[3][b] = -g1;
    }
    FOR(a, 4) {
        st(m + a * 4 * lde, t[a][0]);
        st(m + (a * 4 + 1) * lde, t[a][0] + t[a][1]);
        st(m + (a * 4 + 2) * lde, t[a][0] - t[a][1]);
        st(m + (a * 4 + 3) * lde, -t[a][1]);
    }
}

/* == scratch == */
enum { TILES = 48 }; /* at a time: what they touch stays in the second-level cache */

/* Sixteen parts each of transformed weights U, patches v and products m, and a vector of zeros.
 * A part is followed by a vector of nothing, since distances that are a multiple of 4 KB would
 * share cache sets. */
typedef struct {
    Z su, sv, sm; /* from one part to the next */
    T *U, *v, *m, *zero;
} Scratch;

static T *aligned(Z n) { return aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64); }

static void release(Scratch *s) {
    free(s->U);
    free(s->v);
    free(s->m);
    free(s->zero);
}

static int reserve(Scratch *s, Z C, Z O) {
    s->su = C * O + L;
    s->sv = TILES * C + L;
    s->sm = TILES * O + L;
    s->U = aligned(16 * s->su);
    s->v = aligned(16 * s->sv);
    s->m = aligned(16 * s->sm);
    s->zero = aligned(L);
    if (!s->U || !s->v || !s->m || !s->zero) {
        release(s);
        return 1;
    }
    memset(s->zero, 0, 64);
    return 0;
}

/* == wino_forward == */
/* y (N, H, W, O) = x (N, H, W, C) * w; w (9, C, O), strides tap, in and 1; flip: the taps in
 * reverse order, as the gradient of the input needs them. */
int wino_forward(const T *x, Z N, Z H, Z W, Z C, Z O, const T *w, Z tap, Z in, Z flip, T *y) {
    Z th = (H + 1) / 2, tw = (W + 1) / 2, all_tiles = N * th * tw;
    Scratch scratch;
    if (reserve(&scratch, C, O))
        return 1;
    const Z su = scratch.su, sv = scratch.sv, sm = scratch.sm;
    T *U = scratch.U, *v = scratch.v, *m = scratch.m, *zero = scratch.zero;
    for (Z c = 0; c < C; c++)
        for (Z o = 0; o < O; o += L) {
            V g[3][3], h[4][3];
            const V half = all(0.5);
            FOR(a, 3)
                FOR(b, 3)
                    g[a][b] = ld(w + (flip ? 8 - a * 3 - b : a * 3 + b) * tap + c * in + o);
            FOR(b, 3) {
                V e = (g[0][b] + g[2][b]) * half, f = g[1][b] * half;
                h[0][b] = g[0][b];
                h[1][b] = e + f;
                h[2][b] = e - f;
                h[3][b] = g[2][b];
            }
            FOR(a, 4) {
                V e = (h[a][0] + h[a][2]) * half, f = h[a][1] * half;
                T *to = U + a * 4 * su + c * O + o;
                st(to, h[a][0]);
                st(to + su, e + f);
                st(to + 2 * su, e - f);
                st(to + 3 * su, h[a][2]);
            }
        }
    for (Z t0 = 0; t0 < all_tiles; t0 += TILES) {
        Z n = all_tiles - t0 < TILES ? all_tiles - t0 : TILES;
        for (Z t = 0; t < n; t++) {
            Z k = t0 + t, i = k / tw % th * 2, j = k % tw * 2;
            const T *from = x + k / (th * tw) * H * W * C;
            for (Z c = 0; c < C; c += L)
                to_patch(from, H, W, C, i, j, c, zero, v + t * C + c, sv);
        }
        FOR(e, 16)
            product_(0, v + e * sv, C, 1, U + e * su, O, n, C, O, m + e * sm, O);
        for (Z t = 0; t < n; t++) {
            Z k = t0 + t, i = k / tw % th * 2, j = k % tw * 2;
            T *to = y + k / (th * tw) * H * W * O;
            for (Z o = 0; o < O; o += L)
                from_products(m + t * O + o, sm, to, H, W, O, i, j, o);
        }
    }
    release(&scratch);
    return 0;
}

/* == wino_weight == */
/* gw (O, 3, 3, C): the gradient of the weights from gy (N, H, W, O). */
int wino_weight(const T *x, const T *gy, Z N, Z H, Z W, Z C, Z O, T *gw) {
    Z th = (H + 1) / 2, tw = (W + 1) / 2, all_tiles = N * th * tw;
    Scratch scratch;
    if (reserve(&scratch, C, O))
        return 1;
    const Z su = scratch.su, sv = scratch.sv, sm = scratch.sm;
    T *U = scratch.U, *v = scratch.v, *m = scratch.m, *zero = scratch.zero;
    memset(U, 0, 16 * su * sizeof(T));
    for (Z t0 = 0; t0 < all_tiles; t0 += TILES) {
        Z n = all_tiles - t0 < TILES ? all_tiles - t0 : TILES;
        for (Z t = 0; t < n; t++) {
            Z k = t0 + t, i = k / tw % th * 2, j = k % tw * 2;
            const T *from = x + k / (th * tw) * H * W * C;
            const T *grad = gy + k / (th * tw) * H * W * O;
            for (Z c = 0; c < C; c += L)
                to_patch(from, H, W, C, i, j, c, zero, v + t * C + c, sv);
            for (Z o = 0; o < O; o += L)
                to_products(grad, H, W, O, i, j, o, zero, m + t * O + o, sm);
        }
        FOR(e, 16)
            product_(1, m + e * sm, 1, O, v + e * sv, C, O, n, C, U + e * su, C);
    }
    for (Z o = 0; o < O; o++)
        for (Z c = 0; c < C; c += L) {
            V h[3][4];
            const V half = all(0.5);
            const T *u = U + o * C + c;
            FOR(b, 4) {
                V u0 = ld(u + b * su), u1 = ld(u + (4 + b) * su), u2 = ld(u + (8 + b) * su),
                  u3 = ld(u + (12 + b) * su), e = (u1 + u2) * half;
                h[0][b] = u0 + e;
                h[1][b] = (u1 - u2) * half;
                h[2][b] = e + u3;
            }
            FOR(a, 3) {
                V e = (h[a][1] + h[a][2]) * half;
                T *to = gw + (o * 9 + a * 3) * C + c;
                st(to, h[a][0] + e);
                st(to + C, (h[a][1] - h[a][2]) * half);
                st(to + 2 * C, e + h[a][3]);
            }
        }
    release(&scratch);
    return 0;
}
