package jsapi

import (
	"errors"
	"slices"

	"github.com/nats-io/nats.go/jetstream"
)

// Error codes of the server that jetstream has no names for.
const (
	CodeAccountExceeded        jetstream.ErrorCode = 10002
	CodeNoRoomInCluster        jetstream.ErrorCode = 10005 // not enough of the servers have it
	CodeTemporarilyUnavailable jetstream.ErrorCode = 10008
	CodeInsufficientResources  jetstream.ErrorCode = 10023 // of the server's store
	CodeMemoryExceeded         jetstream.ErrorCode = 10028
	CodeSequenceNotFound       jetstream.ErrorCode = 10043
	CodeStorageExceeded        jetstream.ErrorCode = 10047 // by the bytes that a stream reserves
	CodeMessageTooLarge        jetstream.ErrorCode = 10054
	CodeDeleteFailed           jetstream.ErrorCode = 10057
	CodeStreamNameExists       jetstream.ErrorCode = 10058
	CodeOtherStream            jetstream.ErrorCode = 10060 // another stream than expected takes the subject
	CodeSubjectsOverlap        jetstream.ErrorCode = 10065
	CodeWrongLastSequence      jetstream.ErrorCode = 10071
	CodeStoreFailed            jetstream.ErrorCode = 10077 // maximum bytes or messages exceeded, with discard new
	CodeFilterNotSubset        jetstream.ErrorCode = 10093
	CodeWorkQueueUnfiltered    jetstream.ErrorCode = 10099
	CodeWorkQueueNotUnique     jetstream.ErrorCode = 10100
	CodeConsumerExists         jetstream.ErrorCode = 10148
	CodeIDInProcess            jetstream.ErrorCode = 10158
	CodeSubjectInProcess       jetstream.ErrorCode = 10164
)

// Is reports whether err is the server's answer with one of the codes.
func Is(err error, codes ...jetstream.ErrorCode) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && slices.Contains(codes, api.ErrorCode)
}

// IsFull reports whether a message was refused because a limit of the stream or the
// account is reached.
func IsFull(err error) bool {
	return Is(err, CodeStoreFailed, CodeInsufficientResources, CodeAccountExceeded, CodeStorageExceeded)
}

// NoRoom reports whether a stream was refused because there is no room for the bytes that
// it reserves.
func NoRoom(err error) bool { return Is(err, CodeStorageExceeded, CodeNoRoomInCluster) }

// IsGone reports whether a message was not deleted because it is gone. If another deletes
// it at the same time, the server gives the code of any failure, and the reason as text.
func IsGone(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && (api.ErrorCode == CodeSequenceNotFound || api.ErrorCode == CodeDeleteFailed && api.Description == "no message found")
}
