/* The ideal that loader.py is compared with: libjpeg-turbo decodes a box of a JPEG and skips what is around it. */
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#define MARGIN 16 /* left and right of the box: the smoothing of colours reads the neighbouring pixels */

struct failure {
    struct jpeg_error_mgr manager;
    jmp_buf back;
};

static void fail(j_common_ptr jpeg) { longjmp(((struct failure *)jpeg->err)->back, 1); }

/* Pixels (RGB, interleaved) of the box into out; 0, or 1 for bytes that are not a JPEG. */
int crop_decode(const unsigned char *data, size_t size, int top, int left, int height, int width, unsigned char *out)
{
    struct jpeg_decompress_struct jpeg;
    struct failure failure;
    unsigned char *volatile row = NULL;
    jpeg.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = fail;
    if (setjmp(failure.back)) {
        jpeg_destroy_decompress(&jpeg);
        free(row);
        return 1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, size);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    JDIMENSION start = left > MARGIN ? left - MARGIN : 0;
    JDIMENSION across = left + width + MARGIN - start;
    if (start + across > jpeg.output_width)
        across = jpeg.output_width - start;
    jpeg_crop_scanline(&jpeg, &start, &across);
    row = malloc(across * 3);
    JSAMPROW rows[1] = {row};
    if (top > 0)
        jpeg_skip_scanlines(&jpeg, top);
    for (int y = 0; y < height; y++) {
        jpeg_read_scanlines(&jpeg, rows, 1);
        memcpy(out + (size_t)y * width * 3, row + (left - start) * 3, (size_t)width * 3);
    }
    jpeg_destroy_decompress(&jpeg);
    free(row);
    return 0;
}
