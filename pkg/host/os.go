package host

import (
	"context"
	"errors"
)

func detectOS(ctx context.Context, files Files) (OS, error) {
	return OS{}, errors.New("os detection: to be written")
}
